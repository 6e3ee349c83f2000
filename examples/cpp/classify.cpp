// An app that runs a bundle without Python: which class does each picture show?
//
//     classify build/efficientnet-lite0.x86-64.edgec PICTURE.ppm...
//
// How a picture becomes an input, and the names of the classes, are in the bundle. README.md
// says how to build it.
#include <cmath>
#include <cstdio>
#include <exception>
#include <memory>
#include <numeric>

#include "edgec_model.h"
#include "picture.hpp"

namespace {

using Bundle = std::unique_ptr<EdgecBundle, decltype(&edgec_bundle_close)>;
using Model = std::unique_ptr<EdgecModel, decltype(&edgec_model_close)>;

std::vector<std::string> labels_of(const EdgecJson* manifest) {
    std::vector<std::string> labels;
    const EdgecJson* list = edgec_json_find(manifest, "labels");
    if (list && list->kind == EDGEC_JSON_ARRAY)
        for (const EdgecJson* item = list->first; item; item = item->next)
            labels.emplace_back(item->kind == EDGEC_JSON_STRING ? item->text : "?");
    return labels;
}

// The logits of one picture: the first output, float32.
std::vector<float> run(const EdgecModel& model, std::vector<float> feed,
                       const edgec::Preparation& how) {
    EdgecError error;
    const bool planes = how.layout == "NCHW";
    const std::int64_t shape[4] = {1, planes ? 3 : how.height, planes ? how.height : how.width,
                                   planes ? how.width : 3};
    if (model.input_count != 1 || how.input != model.inputs[0].name ||
        model.outputs[0].type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
        throw std::runtime_error("this is no classifier of pictures");
    OrtValue* input = edgec_tensor(&model, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, shape, 4,
                                   feed.data(), feed.size() * sizeof(float), &error);
    std::vector<OrtValue*> outputs(model.output_count);
    const OrtValue* inputs[1] = {input};
    const bool right = input && edgec_model_run(&model, inputs, outputs.data(), &error);
    std::vector<float> logits;
    if (right) {
        OrtTensorTypeAndShapeInfo* info = nullptr;
        std::size_t count = 0;
        float* data = nullptr;
        OrtStatus* status = model.api->GetTensorTypeAndShape(outputs[0], &info);
        if (!status) status = model.api->GetTensorShapeElementCount(info, &count);
        if (!status) status = model.api->GetTensorMutableData(outputs[0], (void**)&data);
        if (!status) logits.assign(data, data + count);
        if (status) model.api->ReleaseStatus(status);
        if (info) model.api->ReleaseTensorTypeAndShapeInfo(info);
        for (OrtValue* output : outputs) model.api->ReleaseValue(output);
    }
    if (input) model.api->ReleaseValue(input);
    if (!right) throw std::runtime_error(error.text);
    if (logits.empty()) throw std::runtime_error("the model gave no logits");
    return logits;
}

void print_best(const std::string& path, const std::vector<float>& logits,
                const std::vector<std::string>& labels) {
    const float most = *std::max_element(logits.begin(), logits.end());
    std::vector<double> shares;
    for (float logit : logits) shares.push_back(std::exp(double(logit) - most));
    const double sum = std::accumulate(shares.begin(), shares.end(), 0.0);
    std::vector<std::size_t> order(shares.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::size_t shown = std::min<std::size_t>(5, order.size());
    std::partial_sort(order.begin(), order.begin() + std::ptrdiff_t(shown), order.end(),
                      [&](std::size_t a, std::size_t b) { return shares[a] > shares[b]; });
    std::printf("%s:", path.substr(path.find_last_of('/') + 1).c_str());
    for (std::size_t i = 0; i < shown; i++) {
        const std::size_t best = order[i];
        const std::string name = best < labels.size() ? labels[best] : std::to_string(best);
        std::printf("%s %s %.0f%%", i ? "," : "", name.c_str(), 100 * shares[best] / sum);
    }
    std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 3) {
        std::fprintf(stderr, "usage: classify BUNDLE PICTURE.ppm...\n");
        return 2;
    }
    try {
        EdgecError error;
        const Bundle bundle(edgec_bundle_open(arguments[1], EDGEC_CHECK_AUTO, &error),
                            edgec_bundle_close);
        if (!bundle) throw std::runtime_error(error.text);
        const Model model(
            edgec_model_open(bundle.get(), EDGEC_THREADS_OF_MANIFEST, false, &error),
            edgec_model_close);
        if (!model) throw std::runtime_error(error.text);
        const EdgecJson* manifest = edgec_bundle_manifest(bundle.get());
        const edgec::Preparation how(edgec_json_find(manifest, "image"));
        const auto labels = labels_of(manifest);
        for (int i = 2; i < count; i++) {
            const edgec::Picture picture = edgec::read_ppm(arguments[i]);
            print_best(arguments[i], run(*model, edgec::prepare(picture, how), how), labels);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "classify: %s\n", error.what());
        return 1;
    }
    return 0;
}
