import CEdgec
import Foundation

/// A bundle in a Swift app: `try Model(url: url).run(pixels, shape: [1, 3, 224, 224])`.
///
/// The bundle is read by the C files beside this one, which README.md names. An app's own folder
/// is read-only and that is enough: ONNX Runtime maps the weights from the file.
public final class Model {
    public struct Failure: Error, CustomStringConvertible {
        public let description: String
    }

    private let bundle: OpaquePointer
    private let model: UnsafeMutablePointer<EdgecModel>

    /// threads: -1 for what the bundle says. anyTarget: also run a bundle of another device class.
    public init(url: URL, threads: Int32 = -1, anyTarget: Bool = false) throws {
        var error = EdgecError()
        guard let bundle = edgec_bundle_open(url.path, EDGEC_CHECK_AUTO, &error) else {
            throw Failure(error)
        }
        guard let model = edgec_model_open(bundle, threads, anyTarget, &error) else {
            edgec_bundle_close(bundle)
            throw Failure(error)
        }
        self.bundle = bundle
        self.model = model
    }

    deinit {
        edgec_model_close(model)
        edgec_bundle_close(bundle)
    }

    /// The names of the classes; empty if the model is no classifier that has them.
    public var labels: [String] {
        var labels: [String] = []
        var item = edgec_json_find(edgec_bundle_manifest(bundle), "labels")?.pointee.first
        while let label = item {
            labels.append(label.pointee.text.map { String(cString: $0) } ?? "?")
            item = label.pointee.next
        }
        return labels
    }

    /// The first output for the only input, both float32.
    public func run(_ values: [Float], shape: [Int64]) throws -> [Float] {
        let api = model.pointee.api.pointee
        guard model.pointee.input_count == 1, model.pointee.output_count > 0,
            model.pointee.inputs[0].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
            model.pointee.outputs[0].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
        else { throw Failure(description: "the model has other inputs or outputs than one array") }
        var error = EdgecError()
        var data = values
        return try data.withUnsafeMutableBytes { bytes in
            guard let input = edgec_tensor(
                model, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape, shape.count,
                bytes.baseAddress, bytes.count, &error)
            else { throw Failure(error) }
            defer { api.ReleaseValue(input) }
            var inputs: [OpaquePointer?] = [input]
            var outputs = [OpaquePointer?](repeating: nil, count: model.pointee.output_count)
            guard edgec_model_run(model, &inputs, &outputs, &error) else { throw Failure(error) }
            defer { outputs.forEach { api.ReleaseValue($0) } }
            return try floats(outputs[0], api)
        }
    }

    private func floats(_ value: OpaquePointer?, _ api: OrtApi) throws -> [Float] {
        var info: OpaquePointer?
        var count = 0
        var data: UnsafeMutableRawPointer?
        var status = api.GetTensorTypeAndShape(value, &info)
        defer { api.ReleaseTensorTypeAndShapeInfo(info) }
        if status == nil { status = api.GetTensorShapeElementCount(info, &count) }
        if status == nil { status = api.GetTensorMutableData(value, &data) }
        guard status == nil, let data else {
            api.ReleaseStatus(status)
            throw Failure(description: "the model gave no output")
        }
        let floats = data.assumingMemoryBound(to: Float.self)
        return Array(UnsafeBufferPointer(start: floats, count: count))
    }
}

extension Model.Failure {
    init(_ error: EdgecError) {
        description = withUnsafeBytes(of: error.text) { text in
            String(decoding: text.prefix { $0 != 0 }, as: UTF8.self)
        }
    }
}
