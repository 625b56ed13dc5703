// Submits a run to a server, shows its progress, and writes the samples.
//
//     drp serve digits -d 2 &      prints the address
//     submit ADDRESS 3,1,4 samples.pgm
//
// The samples are written side by side into one picture, PGM for one channel and PPM for three. If the file name ends
// in .f32, they are written as float32 instead.

#include <algorithm>
#include <drp/client.hpp>
#include <fstream>
#include <iostream>
#include <sstream>

namespace {

// Maps [-1, 1] to 0 to 255.
unsigned char to_byte(float value) {
    return static_cast<unsigned char>(std::clamp((value + 1.0F) * 127.5F, 0.0F, 255.0F) + 0.5F);
}

std::string picture(const drp::Tensor& samples) {
    if (samples.shape.size() != 4 || (samples.shape[1] != 1 && samples.shape[1] != 3))
        throw std::runtime_error("these samples are not pictures; give a file name that ends in .f32");
    const std::int64_t count = samples.shape[0], channels = samples.shape[1], height = samples.shape[2],
                       width = samples.shape[3];
    std::ostringstream out;
    out << (channels == 1 ? "P5" : "P6") << '\n' << count * width << ' ' << height << "\n255\n";
    const float* elements = samples.data<float>();
    for (std::int64_t y = 0; y < height; ++y)
        for (std::int64_t sample = 0; sample < count; ++sample)
            for (std::int64_t x = 0; x < width; ++x)
                for (std::int64_t channel = 0; channel < channels; ++channel)
                    out.put(
                        static_cast<char>(to_byte(elements[((sample * channels + channel) * height + y) * width + x])));
    return out.str();
}

std::string raw(const drp::Tensor& samples) {
    return {reinterpret_cast<const char*>(samples.data<float>()), samples.nbytes()};
}

void submit(const std::string& address, const std::string& labels, const std::string& path) {
    const drp::Client client(address);
    std::cerr << client.server().model << " on " << client.server().devices.size() << " devices\n";

    drp::Request request;
    request.labels.emplace();
    std::istringstream items(labels);
    for (std::string label; std::getline(items, label, ',');) request.labels->push_back(std::stoll(label));
    request.progress = true;
    const drp::Run run = client.submit(request);
    while (const auto progress = run.next())
        std::cerr << "\rstep " << progress->step << " of " << progress->steps << std::flush;
    const drp::Result result = run.result();
    for (const std::string& incident : result.incidents)
        std::cerr << "\nmeanwhile " << incident.substr(0, incident.find('\n'));

    std::ofstream file(path, std::ios::binary);
    const bool is_raw = path.size() > 4 && path.substr(path.size() - 4) == ".f32";
    file << (is_raw ? raw(result.samples) : picture(result.samples));
    if (!file.flush()) throw std::runtime_error(path + " cannot be written");
    std::cout << result.mode << ": " << result.steps << " steps in " << result.rounds << " rounds, " << path
              << std::endl;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4) {
        std::cerr << "submit ADDRESS LABELS FILE, as in: submit ipc:///tmp/drp/server 3,1,4 samples.pgm\n";
        return 2;
    }
    try {
        submit(arguments[1], arguments[2], arguments[3]);
        return 0;
    } catch (const std::exception& error) {
        std::cerr << '\n' << error.what() << std::endl;
        return 1;
    }
}
