package ai.onnxruntime;

import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/** Stands for ONNX Runtime's class: it keeps what it is given. */
public class OrtSession implements AutoCloseable {
    public final byte[] model;
    public final Map<String, String> settings;

    OrtSession(byte[] model, Map<String, String> settings) {
        this.model = model;
        this.settings = settings;
    }

    public Result run(Map<String, ? extends OnnxTensorLike> inputs) throws OrtException {
        return new Result(List.copyOf(inputs.values()));
    }

    @Override
    public void close() throws OrtException {}

    /** The inputs: nothing is computed here. */
    public static class Result implements AutoCloseable {
        private final List<OnnxTensorLike> values;

        Result(List<OnnxTensorLike> values) {
            this.values = values;
        }

        public OnnxValue get(int index) {
            return values.get(index);
        }

        @Override
        public void close() {}
    }

    public static class SessionOptions implements AutoCloseable {
        final Map<String, String> settings = new TreeMap<>();

        public void setSessionLogLevel(OrtLoggingLevel level) throws OrtException {}

        public void setIntraOpNumThreads(int count) throws OrtException {
            settings.put("threads", String.valueOf(count));
        }

        public void setInterOpNumThreads(int count) throws OrtException {}

        public void addConfigEntry(String key, String value) throws OrtException {
            settings.put(key, value);
        }

        @Override
        public void close() {}
    }
}
