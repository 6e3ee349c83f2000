import edgec.EdgecBundle;
import java.io.IOException;
import java.nio.file.Path;
import java.security.MessageDigest;

/** For the tests: opens bundles, one line for each: "ok", digest of the graph, settings. */
public class OpenBundles {
    public static void main(String[] arguments) throws Exception {
        for (int i = 2; i < arguments.length; i++) {
            try (EdgecBundle bundle =
                    EdgecBundle.open(Path.of(arguments[i]), arguments[0], arguments[1])) {
                StringBuilder hex = new StringBuilder();
                for (byte b : MessageDigest.getInstance("SHA-256").digest(bundle.session().model))
                    hex.append(String.format("%02x", b));
                System.out.println("ok " + hex + " " + bundle.session().settings);
            } catch (IOException error) {
                System.out.println(error.getMessage());
            }
        }
    }
}
