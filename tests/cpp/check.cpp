// A program with which the tests exercise the C++ client.
//
//     check vectors < LINES           decodes named messages in hexadecimal; prints each as JSON, and encoded again
//     check soak ADDRESS SEED COUNT   submits requests, cancels or abandons some; prints the outcomes
//     check once ADDRESS STEPS [SERVER_KEY PUBLIC_KEY SECRET_KEY]
//                                     submits one request; prints the outcome

#include <cstdlib>
#include <drp/client.hpp>
#include <iomanip>
#include <iostream>
#include <random>
#include <sstream>

namespace {

using namespace drp::protocol;
using Any = std::variant<Open, Submit, Ack, Cancel, Query, Welcome, Accepted, Refused, Progress, Finished, Ended,
                         Status, Metrics, Heartbeat>;

std::string hex(const std::vector<char>& bytes) {
    std::ostringstream out;
    for (const char byte : bytes) out << std::hex << std::setw(2) << std::setfill('0') << (byte & 0xff);
    return out.str();
}

// A message as JSON; 1.0 is a float, 1 an int.
class Json {
public:
    template <class Message>
    static std::string of(const Message& message) {
        Json json;
        json.out_ << "{\"type\": \"" << Message::type << '"';
        json.put_fields(message, ", ");
        json.out_ << '}';
        return json.out_.str();
    }

private:
    template <class T>
    void put_fields(const T& record, const char* between) {
        T::fields(record, [&](const char* name, const auto& value, auto) {
            out_ << between << '"' << name << "\": ";
            put(value);
            between = ", ";
        });
    }
    void put(std::int64_t value) { out_ << value; }
    void put(bool value) { out_ << (value ? "true" : "false"); }
    void put(double value) {
        std::ostringstream digits;
        digits << std::setprecision(17) << value;
        out_ << digits.str() << (digits.str().find_first_of(".e") == std::string::npos ? ".0" : "");
    }
    void put(const std::string& value) {
        out_ << '"';
        for (const char each : value) {
            if (static_cast<unsigned char>(each) < 0x20)
                out_ << "\\u00" << hex({each});
            else
                out_ << (each == '"' || each == '\\' ? "\\" : "") << each;
        }
        out_ << '"';
    }
    template <class T>
    void put(const std::vector<T>& values) {
        const char* between = "[";
        for (const T& value : values) {
            out_ << between;
            put(value);
            between = ", ";
        }
        out_ << (values.empty() ? "[]" : "]");
    }
    template <class T>
    void put(const std::optional<T>& value) {
        if (value)
            put(*value);
        else
            out_ << "null";
    }
    template <class... Each>
    void put(const std::variant<Each...>& value) {
        std::visit([&](const auto& each) { put(each); }, value);
    }
    template <class T, class = IsRecord<T>>
    void put(const T& record) {
        out_ << '{';
        put_fields(record, "");
        out_ << '}';
    }

    std::ostringstream out_;
};

std::string unhex(const std::string& digits) {
    std::string bytes;
    for (std::size_t i = 0; digits != "-" && i + 1 < digits.size(); i += 2)
        bytes.push_back(static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16)));
    return bytes;
}

void vectors() {
    std::string name, digits;
    while (std::cin >> name >> digits) {
        const std::string bytes = unhex(digits);
        try {
            const Any message = drp::protocol::decode<Any>(bytes.data(), bytes.size());
            std::visit(
                [&](const auto& each) {
                    std::cout << name << ' ' << hex(encode(each)) << ' ' << Json::of(each) << '\n';
                },
                message);
        } catch (const drp::Error& error) {
            std::cout << name << (error.code == drp::Code::protocol ? " refused -\n" : " broken -\n");
        }
    }
}

// FNV-1a, so that samples can be compared from outside.
std::uint64_t digest(const drp::Tensor& samples) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(samples.data<float>());
    std::uint64_t sum = 0xcbf29ce484222325;
    for (std::size_t i = 0; i < samples.nbytes(); ++i) sum = (sum ^ bytes[i]) * 0x100000001b3;
    return sum;
}

// Submits a request, and perhaps cancels or abandons it, at random. Prints a line with the outcome.
void request(std::optional<drp::Client>& client, const std::string& address, std::mt19937& random) {
    drp::Request request;
    const std::int64_t label = random() % 4, seed = random() % 3, way = random() % 10;
    request.labels = {label, label + 1};
    request.seed = seed;
    request.steps = way == 2 || way == 3 || way == 4 ? 600 : 12;
    request.progress = way != 1;
    request.previews = way == 5 ? 3 : 0;
    request.shared_from = way % 2 ? 0 : drp::protocol::kMaxFrameBytes;
    std::cout << label << ' ' << seed << ' ' << request.steps << ' ';
    try {
        const drp::Run run = client->submit(request);
        if (way == 2) {
            run.cancel();
        } else if (way == 3) {
            run.next();
            run.cancel();
        } else if (way == 4) {
            run.next();
            client.reset();  // in the middle of the run
            client.emplace(address);
        }
        const drp::Result result = run.result();
        std::cout << "finished " << std::hex << digest(result.samples) << std::dec << '\n';
    } catch (const drp::Error& error) {
        std::cout << "error " << static_cast<int>(error.code) << ' ' << error.what() << '\n';
    }
}

void soak(const std::string& address, unsigned seed, int count) {
    std::mt19937 random(seed);
    std::optional<drp::Client> client(address);
    for (int i = 1; i < count; ++i) request(client, address, random);
    drp::Request last;
    last.labels = {1, 2};
    last.steps = 600;
    last.progress = true;
    const drp::Run run = client->submit(last);
    run.next();
    std::cout << "left" << std::endl;
    std::_Exit(0);  // while a run is running
}

// Prints the error of the connection, or the result or the error of the run.
void once(const std::string& address, std::int64_t steps, const std::optional<drp::Keys>& keys) {
    try {
        const drp::Client client(address, {"once", keys, 5.0});
        drp::Request request;
        request.labels = {1, 2};
        request.steps = steps;
        request.progress = true;
        const drp::Run run = client.submit(request);
        if (run.next()) std::cout << "running" << std::endl;
        const drp::Result result = run.result();
        std::cout << "finished " << std::hex << digest(result.samples) << std::endl;
        for (const std::string& incident : result.incidents)
            std::cout << "meanwhile " << incident.substr(0, incident.find('\n')) << std::endl;
    } catch (const drp::Error& error) {
        std::cout << "error " << static_cast<int>(error.code) << ' ' << error.what() << std::endl;
    }
}

}  // namespace

int main(int count, char** arguments) {
    try {
        const std::string what = count > 1 ? arguments[1] : "";
        if (what == "vectors")
            vectors();
        else if (what == "soak" && count == 5)
            soak(arguments[2], static_cast<unsigned>(std::stoul(arguments[3])), std::stoi(arguments[4]));
        else if (what == "once" && (count == 4 || count == 7))
            once(arguments[2], std::stoll(arguments[3]),
                 count == 4 ? std::nullopt : std::optional<drp::Keys>({arguments[4], arguments[5], arguments[6]}));
        else
            return 2;
        return 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << std::endl;
        return 1;
    }
}
