package android.os;

/** Stands for Android's class. */
public class Build {
    public static final String[] SUPPORTED_ABIS = {"arm64-v8a"};
}
