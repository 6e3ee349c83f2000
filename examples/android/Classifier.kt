package edgec

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import android.content.Context
import android.graphics.Bitmap
import android.os.Build
import java.io.File
import java.nio.FloatBuffer
import kotlin.math.exp

/**
 * A classifier of pictures in an Android app: `Classifier(context, "model.edgec").best(bitmap)`.
 *
 * The bundle is an asset; ONNX Runtime maps its weights from a file, so it is copied once.
 * The picture must have the bundle's size already (`Bitmap.createScaledBitmap` of a centre crop
 * is close to, but not quite, what edgec_runtime.image does).
 */
class Classifier(context: Context, asset: String) : AutoCloseable {
    data class Guess(val label: String, val share: Double)

    private val bundle = EdgecBundle.open(copied(context, asset).toPath(), ARCH, "android")
    private val image = bundle.manifest()["image"] as? Map<*, *>
        ?: throw IllegalArgumentException("$asset does not say how to prepare pictures")
    private val size = (image["size"] as List<*>).map { (it as Long).toInt() }
    private val mean = (image["mean"] as List<*>).map { (it as Number).toFloat() }
    private val std = (image["std"] as List<*>).map { (it as Number).toFloat() }

    /** The five likeliest classes. bitmap: of the bundle's height and width. */
    fun best(bitmap: Bitmap): List<Guess> {
        val (height, width) = size
        require(bitmap.width == width && bitmap.height == height) {
            "the bitmap is ${bitmap.width} x ${bitmap.height}, expected $width x $height"
        }
        val pixels = IntArray(width * height)
        bitmap.getPixels(pixels, 0, width, 0, 0, width, height)
        val planes = image["layout"] == "NCHW"
        val order = if (image["channels"] == "BGR") intArrayOf(2, 1, 0) else intArrayOf(0, 1, 2)
        val feed = FloatArray(3 * pixels.size)
        for (i in pixels.indices) for (c in 0..2) {
            val value = pixels[i] shr (16 - 8 * order[c]) and 0xFF
            feed[if (planes) c * pixels.size + i else 3 * i + c] = (value - mean[c]) / std[c]
        }
        val shape = if (planes) longArrayOf(1, 3, height.toLong(), width.toLong())
        else longArrayOf(1, height.toLong(), width.toLong(), 3)
        val environment = OrtEnvironment.getEnvironment()
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(feed), shape).use { input ->
            bundle.session().run(mapOf(image["input"] as String to input)).use { result ->
                @Suppress("UNCHECKED_CAST")
                return guesses((result[0].value as Array<FloatArray>)[0])
            }
        }
    }

    override fun close() = bundle.close()

    private fun guesses(logits: FloatArray): List<Guess> {
        val most = logits.fold(Float.NEGATIVE_INFINITY) { a, b -> maxOf(a, b) }
        val shares = logits.map { exp((it - most).toDouble()) }
        val labels = bundle.labels()
        return shares.indices.sortedByDescending { shares[it] }.take(5)
            .map { Guess(labels.getOrElse(it) { _ -> "$it" }, shares[it] / shares.sum()) }
    }

    private companion object {
        // the ABIs of Android in the words of a bundle's target
        val ARCH = if (Build.SUPPORTED_ABIS[0] == "x86_64") "x86_64" else "arm64"

        fun copied(context: Context, asset: String): File {
            val goal = File(context.filesDir, asset)
            if (!goal.exists()) {
                val partial = File(context.filesDir, "$asset.part")
                context.assets.open(asset).use { from ->
                    partial.outputStream().use { to -> from.copyTo(to) }
                }
                check(partial.renameTo(goal)) { "$goal cannot be written" }
            }
            return goal
        }
    }
}
