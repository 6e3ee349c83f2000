package ai.onnxruntime;

/** Stands for ONNX Runtime's class: it keeps what it is given. */
public final class OrtEnvironment {
    public static OrtEnvironment getEnvironment() {
        return new OrtEnvironment();
    }

    public void setTelemetry(boolean send) throws OrtException {}

    public OrtSession createSession(byte[] model, OrtSession.SessionOptions options)
            throws OrtException {
        return new OrtSession(model, options.settings);
    }
}
