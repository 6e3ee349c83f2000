package edgec;

import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtLoggingLevel;
import ai.onnxruntime.OrtSession;
import java.io.IOException;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * A bundle of edgec, opened as a session of ONNX Runtime: docs/bundle-format.md in one file.
 *
 * <p>The file must lie in the app's own storage (copy an asset there once): ONNX Runtime maps
 * the weights from it. Checked: the digests of all entries, the places that they state, that
 * every external tensor lies in the weights, and the session options. Left out: golden sample.
 */
public final class EdgecBundle implements AutoCloseable {
    /** The file is no intact bundle, or not for this device; the message is for people. */
    public static final class BundleException extends IOException {
        BundleException(Path path, String what) {
            super("bundle " + path + ": " + what);
        }
    }

    private static final int FORMAT_VERSION = 1;
    private static final int WEIGHTS_OFFSET = 65536;
    private static final int LOCATION_BYTES = 257;
    private static final long MAX_MANIFEST_BYTES = 16L << 20;
    private static final String WEIGHTS = "weights.bin";
    private static final String PLACEHOLDER = String.join("", Collections.nCopies(125, "./")) + "weights";
    // edgec_runtime.manifest.SESSION_CONFIG: others could name files
    private static final List<String> SESSION_CONFIG = List.of(
            "mlas.disable_kleidiai", "mlas.enable_gemm_fastmath_arm64_bfloat16",
            "mlas.qnbit.force_fp32", "mlas.use_lut_gemm",
            "optimization.disable_specified_optimizers",
            "optimization.enable_cast_chain_elimination",
            "optimization.enable_gelu_approximation", "session.disable_double_qdq_remover",
            "session.disable_prepacking", "session.disable_qdq_constant_folding",
            "session.disable_quant_qdq", "session.dynamic_block_base",
            "session.enable_dq_matmulnbits_fusion", "session.enable_quant_qdq_cleanup",
            "session.force_spinning_stop", "session.graph_optimizations_loop_level",
            "session.inter_op.allow_spinning", "session.intra_op.allow_spinning",
            "session.qdq_matmulnbits_accuracy_level", "session.qdq_matmulnbits_block_size",
            "session.qdqisint8allowed", "session.set_denormal_as_zero",
            "session.use_deterministic_compute", "session.use_device_allocator_for_initializers",
            "session.use_env_allocators", "session.x64quantprecision");

    private final Path path;
    private final Map<String, Object> manifest;
    private final OrtSession session;

    private EdgecBundle(Path path, Map<String, Object> manifest, OrtSession session) {
        this.path = path;
        this.manifest = manifest;
        this.session = session;
    }

    /**
     * Opens a bundle.
     *
     * @param arch the instruction set of this device, "arm64" on a phone, "x86_64" in an emulator
     * @param os "android", or what the bundle was built for
     */
    public static EdgecBundle open(Path path, String arch, String os)
            throws IOException, OrtException {
        Path real = path.toRealPath();
        try (RandomAccessFile file = new RandomAccessFile(real.toFile(), "r")) {
            Map<String, Object> manifest = readManifest(real, file);
            checkTarget(real, manifest, arch, os);
            Map<String, Map<String, Object>> entries = checkEntries(real, file, manifest);
            Map<String, Object> main = object(object(manifest.get("graphs")).get("main"));
            Map<String, Object> entry = entries.get(String.valueOf(main.get("file")));
            if (entry == null || WEIGHTS.equals(main.get("file")))
                throw new BundleException(real, "it has no graph 'main'");
            byte[] graph = read(file, number(entry, "offset"), Math.toIntExact(number(entry, "size")));
            relocate(real, graph, entries.get(WEIGHTS));
            return new EdgecBundle(real, manifest, openSession(real, manifest, graph));
        } catch (ClassCastException | NullPointerException | ArithmeticException
                | IndexOutOfBoundsException error) {
            throw new BundleException(real, "its manifest or its graph is damaged: " + error);
        }
    }

    /** The session: run it with tensors by the names that its input info states. */
    public OrtSession session() {
        return session;
    }

    /** What the bundle says about itself, as parsed JSON. */
    public Map<String, Object> manifest() {
        return manifest;
    }

    /** The names of the classes; empty if the model is no classifier that has them. */
    public List<String> labels() {
        List<String> labels = new ArrayList<>();
        if (manifest.get("labels") != null)
            for (Object label : list(manifest.get("labels"))) labels.add((String) label);
        return labels;
    }

    @Override
    public void close() throws OrtException {
        session.close();
    }

    @Override
    public String toString() {
        return manifest.get("name") + " from " + path;
    }

    // ---- the file

    /** The manifest is the zip's last member: found by the directory, whose end is fixed. */
    private static Map<String, Object> readManifest(Path path, RandomAccessFile file)
            throws IOException {
        long size = file.length();
        if (size < 22 || read(file, 0, 4)[0] != 'P')
            throw new BundleException(path, "it is not a bundle (a zip written by edgec)");
        ByteBuffer end = little(read(file, size - 22, 22));
        if (end.getInt(0) != 0x06054B50 || end.getShort(20) != 0)
            throw new BundleException(path, "it is truncated or has bytes added at its end");
        long start = Integer.toUnsignedLong(end.getInt(16)), behind = 22;
        if (start == 0xFFFFFFFFL) { // zip64
            behind = 98;
            start = size < behind ? -1 : little(read(file, size - behind, 56)).getLong(48);
        }
        long length = size - behind - start;
        if (start < 0 || length <= 0 || length > 4096L * 274)
            throw new BundleException(path, "its directory does not lie inside the file");
        ByteBuffer directory = little(read(file, start, (int) length));
        long[] found = null;
        String name = "";
        for (int at = 0; at < length; ) {
            if (length - at < 46 || directory.getInt(at) != 0x02014B50)
                throw new BundleException(path, "its directory is altered");
            int nameLength = Short.toUnsignedInt(directory.getShort(at + 28));
            int extraLength = Short.toUnsignedInt(directory.getShort(at + 30));
            long bytes = Integer.toUnsignedLong(directory.getInt(at + 24));
            long header = Integer.toUnsignedLong(directory.getInt(at + 42));
            if (header == 0xFFFFFFFFL) header = directory.getLong(at + 46 + nameLength + extraLength - 8);
            name = new String(directory.array(), at + 46, nameLength, StandardCharsets.US_ASCII);
            found = new long[] {header, bytes, nameLength};
            at += 46 + nameLength + extraLength;
        }
        if (found == null || !name.equals("manifest.json") || found[1] > MAX_MANIFEST_BYTES
                || found[0] < 0 || found[0] + 30 + found[2] + found[1] != start)
            throw new BundleException(path, "its last entry is not manifest.json");
        byte[] text = read(file, start - found[1], (int) found[1]);
        Object parsed;
        try {
            parsed = new Json(new String(text, StandardCharsets.UTF_8)).parse();
        } catch (IllegalArgumentException error) {
            throw new BundleException(path, "its manifest.json is not valid: " + error.getMessage());
        }
        Map<String, Object> manifest = object(parsed);
        if (!Long.valueOf(FORMAT_VERSION).equals(manifest.get("format_version")))
            throw new BundleException(path, "it has another format version than 1, which this app"
                    + " reads; update the app or build the bundle again");
        return manifest;
    }

    private static void checkTarget(Path path, Map<String, Object> manifest, String arch, String os)
            throws BundleException {
        Map<String, Object> target = object(manifest.get("target"));
        if (!arch.equals(target.get("arch")) || !list(target.get("os")).contains(os))
            throw new BundleException(path, "built for " + target.get("name") + ", this is " + arch
                    + " on " + os + "; build it for this device");
    }

    /** Every entry lies behind the one before and has the bytes that its digest states. */
    private static Map<String, Map<String, Object>> checkEntries(
            Path path, RandomAccessFile file, Map<String, Object> manifest) throws IOException {
        Map<String, Map<String, Object>> entries = new LinkedHashMap<>();
        long position = WEIGHTS_OFFSET;
        for (Object item : list(manifest.get("entries"))) {
            Map<String, Object> entry = object(item);
            String name = (String) entry.get("name");
            long offset = number(entry, "offset"), size = number(entry, "size");
            if (offset < position || size < 0 || size > file.length() - offset
                    || entries.put(name, entry) != null)
                throw new BundleException(path, "the entry '" + name + "' is at a wrong place");
            if (!digest(file, offset, size).equals(entry.get("sha256")))
                throw new BundleException(path, "the entry '" + name + "' is altered: its checksum differs");
            position = offset + size;
        }
        Map<String, Object> weights = entries.get(WEIGHTS);
        if (weights == null || number(weights, "offset") != WEIGHTS_OFFSET)
            throw new BundleException(path, "its first entry is not weights.bin");
        return entries;
    }

    private static String digest(RandomAccessFile file, long offset, long size) throws IOException {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            for (long done = 0; done < size; ) {
                int part = (int) Math.min(size - done, 1 << 20);
                digest.update(read(file, offset + done, part));
                done += part;
            }
            StringBuilder hex = new StringBuilder();
            for (byte b : digest.digest()) hex.append(String.format("%02x", b));
            return hex.toString();
        } catch (NoSuchAlgorithmException error) {
            throw new IllegalStateException(error); // every Java has it
        }
    }

    private static byte[] read(RandomAccessFile file, long offset, int size) throws IOException {
        byte[] data = new byte[size];
        file.seek(offset);
        file.readFully(data);
        return data;
    }

    private static ByteBuffer little(byte[] data) {
        return ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN);
    }

    // ---- the graph: the placeholder of every external tensor becomes the file's present name

    /** Fields of onnx.proto that can lead to a tensor: message -> field -> message inside. */
    private static final Map<String, Map<Long, String>> MESSAGES = Map.of(
            "Model", Map.of(7L, "Graph", 20L, "Training", 25L, "Function"),
            "Graph", Map.of(1L, "Node", 5L, "Tensor", 15L, "Sparse"),
            "Node", Map.of(5L, "Attribute"),
            "Attribute", Map.of(5L, "Tensor", 6L, "Graph", 10L, "Tensor", 11L, "Graph",
                    22L, "Sparse", 23L, "Sparse"),
            "Sparse", Map.of(1L, "Tensor", 2L, "Tensor"),
            "Function", Map.of(7L, "Node", 11L, "Attribute"),
            "Training", Map.of(1L, "Graph", 2L, "Graph"));

    private static void relocate(Path path, byte[] graph, Map<String, Object> weights)
            throws BundleException {
        byte[] name = path.getFileName().toString().getBytes(StandardCharsets.UTF_8);
        if (name.length > 255)
            throw new BundleException(path, "its file name has more than 255 bytes; rename it");
        byte[] location = new byte[LOCATION_BYTES];
        int padding = LOCATION_BYTES - name.length;
        for (int i = 0; i < padding; i++) location[i] = (byte) (i % 2 == 0 ? '.' : '/');
        if (padding % 2 == 1) location[padding - 1] = '/';
        System.arraycopy(name, 0, location, padding, name.length);
        walk(path, graph, 0, graph.length, "Model", 0, location, weights);
    }

    private static void walk(Path path, byte[] graph, int start, int end, String message, int depth,
            byte[] location, Map<String, Object> weights) throws BundleException {
        if (depth > 64) throw new BundleException(path, "its graph is nested too deeply");
        Map<String, String> stated = new HashMap<>();
        int locationAt = -1;
        for (int[] field : fields(path, graph, start, end)) {
            if (!message.equals("Tensor")) {
                String inside = MESSAGES.get(message).get((long) field[0]);
                if (inside != null)
                    walk(path, graph, field[1], field[2], inside, depth + 1, location, weights);
            } else if (field[0] == 13) { // external_data
                String key = "", value = "";
                int at = 0;
                for (int[] part : fields(path, graph, field[1], field[2])) {
                    String text = new String(graph, part[1], part[2] - part[1], StandardCharsets.ISO_8859_1);
                    if (part[0] == 1) key = text;
                    if (part[0] == 2) {
                        value = text;
                        at = part[1];
                    }
                }
                if (stated.put(key, value) != null)
                    throw new BundleException(path, "a tensor states where its data is twice");
                if (key.equals("location")) locationAt = at;
            }
        }
        if (locationAt < 0) return;
        long first = number(weights, "offset"), last = first + number(weights, "size");
        long offset = digits(stated.get("offset")), length = digits(stated.get("length"));
        if (!stated.get("location").equals(PLACEHOLDER))
            throw new BundleException(path, "a tensor lies in another file; expected the bundle itself");
        if (offset < first || offset > last || length < 0 || length > last - offset || offset % 64 != 0)
            throw new BundleException(path, "a tensor does not lie in the weights");
        System.arraycopy(location, 0, graph, locationAt, LOCATION_BYTES);
    }

    private static long digits(String text) {
        return text != null && text.matches("[0-9]{1,18}") ? Long.parseLong(text) : -1;
    }

    /** {number, start, end} of the fields of a protobuf message whose values are bytes. */
    private static List<int[]> fields(Path path, byte[] data, int start, int end)
            throws BundleException {
        List<int[]> found = new ArrayList<>();
        long[] at = {start};
        while (at[0] < end) {
            long tag = varint(path, data, at, end);
            int kind = (int) (tag & 7);
            long length = kind == 2 ? varint(path, data, at, end) : kind == 1 ? 8 : kind == 5 ? 4 : 0;
            if (kind == 0) varint(path, data, at, end);
            if ((kind > 2 && kind != 5) || length < 0 || length > end - at[0])
                throw new BundleException(path, "its graph is damaged: no protobuf");
            if (kind == 2)
                found.add(new int[] {(int) Math.min(tag >>> 3, Integer.MAX_VALUE), (int) at[0],
                        (int) (at[0] + length)});
            at[0] += length;
        }
        return found;
    }

    private static long varint(Path path, byte[] data, long[] at, int end) throws BundleException {
        long value = 0;
        for (int shift = 0; shift < 64 && at[0] < end; shift += 7) {
            byte b = data[(int) at[0]++];
            value |= (long) (b & 0x7F) << shift;
            if (b >= 0) return value;
        }
        throw new BundleException(path, "its graph is damaged: a number does not end");
    }

    // ---- the session

    private static OrtSession openSession(Path path, Map<String, Object> manifest, byte[] graph)
            throws IOException, OrtException {
        Map<String, Object> session = object(manifest.get("session"));
        OrtEnvironment environment = OrtEnvironment.getEnvironment();
        environment.setTelemetry(false);
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setSessionLogLevel(OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL);
            options.setIntraOpNumThreads(Math.toIntExact(number(session, "threads")));
            options.setInterOpNumThreads(1);
            Map<String, String> config = new LinkedHashMap<>();
            object(session.get("config")).forEach((key, value) -> config.put(key, (String) value));
            // Java cannot ask for CPU features: what a CPU without them needs is right everywhere
            object(session.get("without")).values().forEach(
                    entries -> object(entries).forEach((key, value) -> config.put(key, (String) value)));
            for (String key : config.keySet())
                if (!SESSION_CONFIG.contains(key))
                    throw new BundleException(path, "session option '" + key + "' is not allowed");
            String disabled = "optimization.disable_specified_optimizers";
            for (Object name : list(session.get("disabled_optimizers")))
                config.merge(disabled, (String) name, (before, more) -> before + ";" + more);
            if (Boolean.FALSE.equals(session.get("prepacking")))
                config.put("session.disable_prepacking", "1");
            config.put("session.model_external_initializers_file_folder_path",
                    path.getParent().toString());
            for (Map.Entry<String, String> entry : config.entrySet())
                options.addConfigEntry(entry.getKey(), entry.getValue());
            return environment.createSession(graph, options);
        }
    }

    // ---- JSON

    @SuppressWarnings("unchecked")
    private static Map<String, Object> object(Object value) {
        return (Map<String, Object>) java.util.Objects.requireNonNull(value);
    }

    private static List<?> list(Object value) {
        return (List<?>) java.util.Objects.requireNonNull(value);
    }

    private static long number(Map<String, Object> object, String key) {
        return (Long) object.get(key);
    }

    /** A strict reader of JSON: Map, List, String, Long, Double, Boolean or null. */
    private static final class Json {
        private final String text;
        private int at;

        Json(String text) {
            this.text = text;
        }

        Object parse() {
            Object value = value(0);
            if (at != text.length()) throw wrong();
            return value;
        }

        private IllegalArgumentException wrong() {
            return new IllegalArgumentException("unexpected text at character " + at);
        }

        private char peek() {
            if (at >= text.length()) throw wrong();
            return text.charAt(at);
        }

        private boolean take(char expected) {
            if (peek() != expected) return false;
            at++;
            return true;
        }

        private void space() {
            while (at < text.length() && " \t\r\n".indexOf(text.charAt(at)) >= 0) at++;
        }

        private Object value(int depth) {
            if (depth > 64) throw wrong();
            space();
            Object value;
            if (peek() == '{') value = members(depth);
            else if (peek() == '[') value = items(depth);
            else if (peek() == '"') value = string();
            else value = word();
            space();
            return value;
        }

        private Map<String, Object> members(int depth) {
            Map<String, Object> members = new LinkedHashMap<>();
            at++;
            space();
            if (take('}')) return members;
            do {
                space();
                String key = string();
                space();
                if (!take(':') || members.containsKey(key)) throw wrong();
                members.put(key, value(depth + 1));
            } while (take(','));
            if (!take('}')) throw wrong();
            return members;
        }

        private List<Object> items(int depth) {
            List<Object> items = new ArrayList<>();
            at++;
            space();
            if (take(']')) return items;
            do items.add(value(depth + 1)); while (take(','));
            if (!take(']')) throw wrong();
            return items;
        }

        private String string() {
            if (!take('"')) throw wrong();
            StringBuilder result = new StringBuilder();
            while (!take('"')) {
                char c = text.charAt(at++);
                if (c < ' ') throw wrong();
                if (c != '\\') {
                    result.append(c);
                    continue;
                }
                int plain = "\"\\/bfnrt".indexOf(peek());
                if (plain >= 0) result.append("\"\\/\b\f\n\r\t".charAt(plain));
                else if (peek() != 'u' || at + 5 > text.length()) throw wrong();
                else {
                    result.append((char) Integer.parseInt(text.substring(at + 1, at + 5), 16));
                    at += 4;
                }
                at++;
            }
            return result.toString();
        }

        private Object word() {
            int start = at;
            while (at < text.length() && ",]} \t\r\n".indexOf(text.charAt(at)) < 0) at++;
            String word = text.substring(start, at);
            if (word.equals("null")) return null;
            if (word.equals("true") || word.equals("false")) return word.equals("true");
            if (word.matches("-?(0|[1-9][0-9]{0,17})")) return Long.valueOf(word);
            if (word.matches("-?(0|[1-9][0-9]*)([.][0-9]+)?([eE][+-]?[0-9]+)?"))
                return Double.valueOf(word);
            throw wrong();
        }
    }
}
