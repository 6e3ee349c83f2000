package android.content.res;

import java.io.IOException;
import java.io.InputStream;

/** Stands for Android's class. */
public abstract class AssetManager {
    public abstract InputStream open(String name) throws IOException;
}
