package android.content;

import android.content.res.AssetManager;
import java.io.File;

/** Stands for Android's class. */
public abstract class Context {
    public abstract AssetManager getAssets();

    public abstract File getFilesDir();
}
