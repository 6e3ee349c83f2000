// A picture as the model's input, as the bundle's manifest says; the algorithm of
// edgec_runtime/image.py: centre crop, antialiased resize in two passes with bytes after each,
// normalisation, layout. Reads PPM (P6), which every picture tool writes.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "edgec_json.h"

namespace edgec {

struct Picture {
    int width = 0, height = 0;
    std::vector<std::uint8_t> rgb;  // [height, width, 3]
};

inline Picture read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string kind;
    Picture picture;
    int most = 0;
    file >> kind >> picture.width >> picture.height >> most;
    file.get();
    const bool fits = picture.width > 0 && picture.height > 0 && picture.width <= 1 << 14 &&
                      picture.height <= 1 << 14;
    if (!file || kind != "P6" || most != 255 || !fits)
        throw std::runtime_error(path + ": expected a PPM picture (P6, 8 bits, no comments)");
    picture.rgb.resize(std::size_t{3} * picture.width * picture.height);
    if (!file.read(reinterpret_cast<char*>(picture.rgb.data()), std::streamsize(picture.rgb.size())))
        throw std::runtime_error(path + ": it is truncated");
    return picture;
}

// What the manifest says about pictures; the fields of edgec_runtime.manifest.Image.
struct Preparation {
    std::string input, channels, layout, resize, dtype;
    int height = 0, width = 0;
    double crop = 1;
    std::array<float, 3> mean{}, std{};

    explicit Preparation(const EdgecJson* image) {
        if (!image || image->kind != EDGEC_JSON_OBJECT)
            throw std::runtime_error("the bundle does not say how to prepare pictures");
        input = text(image, "input");
        channels = text(image, "channels");
        layout = text(image, "layout");
        resize = text(image, "resize");
        dtype = text(image, "dtype");
        crop = find(image, "crop", EDGEC_JSON_NUMBER)->number;
        const EdgecJson* size = list(image, "size", 2);
        height = int(size->integer);
        width = int(size->next->integer);
        if (height < 1 || width < 1 || height > 1 << 14 || width > 1 << 14 || dtype != "float32")
            throw std::runtime_error("this example feeds float32 pictures of at most 16384 pixels");
        const EdgecJson *mean_of = list(image, "mean", 3), *std_of = list(image, "std", 3);
        for (int c = 0; c < 3; c++, mean_of = mean_of->next, std_of = std_of->next) {
            mean[c] = float(mean_of->number);
            std[c] = float(std_of->number);
        }
    }

   private:
    static const EdgecJson* find(const EdgecJson* image, const char* key, EdgecJsonKind kind) {
        const EdgecJson* value = edgec_json_find(image, key);
        const bool whole = kind == EDGEC_JSON_NUMBER && value && value->kind == EDGEC_JSON_INTEGER;
        if (!value || (value->kind != kind && !whole))
            throw std::runtime_error(std::string("the manifest's image has no ") + key);
        return value;
    }
    static std::string text(const EdgecJson* image, const char* key) {
        return find(image, key, EDGEC_JSON_STRING)->text;
    }
    static const EdgecJson* list(const EdgecJson* image, const char* key, std::size_t count) {
        const EdgecJson* value = find(image, key, EDGEC_JSON_ARRAY);
        if (value->count != count)
            throw std::runtime_error(std::string("the manifest's image has a wrong ") + key);
        return value->first;
    }
};

// Pillow's filters, for x >= 0.
inline double filter(const std::string& name, double x) {
    if (name == "bilinear") return std::max(1.0 - x, 0.0);
    constexpr double a = -0.5;  // Keys 1981
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? a * (((x - 5) * x + 8) * x - 4) : 0;
}

// The source positions that one output position weighs.
struct Taps {
    int first = 0;
    std::vector<float> weights;
};

inline std::vector<Taps> taps(double start, double end, int length, int size,
                              const std::string& name) {
    const double scale = (end - start) / size, widening = std::max(scale, 1.0);
    const double support = (name == "bilinear" ? 1.0 : 2.0) * widening;
    std::vector<Taps> all(size);
    for (int i = 0; i < size; i++) {
        const double centre = start + (i + 0.5) * scale;
        const int first = std::max(int(centre - support + 0.5), 0);
        const int last = std::min(int(centre + support + 0.5), length);
        std::vector<double> weights;
        double sum = 0;
        for (int k = first; k < last; k++) {
            weights.push_back(filter(name, std::abs(k + 0.5 - centre) / widening));
            sum += weights.back();
        }
        all[i].first = first;
        for (double weight : weights) all[i].weights.push_back(float(weight / sum));
    }
    return all;
}

inline float rounded(float value) {
    return std::clamp(std::floor(value + 0.5f), 0.0f, 255.0f);
}

// The feed for one picture: float32 [1, 3, h, w] or [1, h, w, 3].
inline std::vector<float> prepare(const Picture& picture, const Preparation& how) {
    const double ratio = double(how.width) / how.height;
    const double box_width = std::min<double>(picture.width, picture.height * ratio) * how.crop;
    const double box_height = box_width / ratio;
    const double left = (picture.width - box_width) / 2, top = (picture.height - box_height) / 2;
    const auto columns = taps(left, left + box_width, picture.width, how.width, how.resize);
    const auto rows = taps(top, top + box_height, picture.height, how.height, how.resize);

    std::vector<float> narrow(std::size_t{3} * picture.height * how.width);  // [height, w, 3]
    for (int y = 0; y < picture.height; y++)
        for (int x = 0; x < how.width; x++)
            for (int c = 0; c < 3; c++) {
                float sum = 0;
                for (std::size_t k = 0; k < columns[x].weights.size(); k++)
                    sum += columns[x].weights[k] *
                           picture.rgb[3 * (std::size_t(y) * picture.width + columns[x].first + k) + c];
                narrow[3 * (std::size_t(y) * how.width + x) + c] = rounded(sum);
            }

    const std::size_t plane = std::size_t(how.height) * how.width;
    std::vector<float> feed(3 * plane);
    for (int y = 0; y < how.height; y++)
        for (int x = 0; x < how.width; x++)
            for (int c = 0; c < 3; c++) {
                float sum = 0;
                for (std::size_t k = 0; k < rows[y].weights.size(); k++)
                    sum += rows[y].weights[k] *
                           narrow[3 * ((rows[y].first + k) * how.width + x) + c];
                const int channel = how.channels == "BGR" ? 2 - c : c;
                const float value = (rounded(sum) - how.mean[channel]) / how.std[channel];
                const std::size_t pixel = std::size_t(y) * how.width + x;
                feed[how.layout == "NCHW" ? channel * plane + pixel : 3 * pixel + channel] = value;
            }
    return feed;
}

}  // namespace edgec
