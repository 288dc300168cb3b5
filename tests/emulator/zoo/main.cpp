// zoo list
// zoo CASE BUG SETTING...   BUG: its name, or "none"; SETTING: schedule/async/seed/proxy, such as random/late/7/1
// Prints a line for each setting: ok, wrong (worst error as a multiple of what is allowed) or error (the emulator's
// message).
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_emu.h"
#include "zoo.h"

namespace zoo {

extern const std::vector<Case> execution_cases, layout_cases, kernel_cases, hopper_cases, conv_cases, rnn_cases,
    attention_cases;

namespace {

emu::Config parse(const std::string& setting) {
  char schedule[16], async[16];
  unsigned seed = 1, proxy = 1;
  if (sscanf(setting.c_str(), "%15[^/]/%15[^/]/%u/%u", schedule, async, &seed, &proxy) < 2) {
    throw std::invalid_argument("setting must be schedule/async/seed/proxy, got " + setting);
  }
  auto index = [](const std::string& name, std::vector<std::string> names) {
    for (size_t i = 0; i < names.size(); ++i) {
      if (names[i] == name) return int(i);
    }
    throw std::invalid_argument("unknown setting " + name);
  };
  emu::Config config;
  config.schedule = emu::Schedule(index(schedule, {"forward", "reverse", "random"}));
  config.async = emu::Async(index(async, {"early", "late", "random"}));
  config.seed = seed;
  config.proxy = proxy;
  return config;
}

int run(int count, char** arguments) {
  std::vector<Case> cases;
  for (auto* group :
       {&execution_cases, &layout_cases, &kernel_cases, &hopper_cases, &conv_cases, &rnn_cases, &attention_cases}) {
    cases.insert(cases.end(), group->begin(), group->end());
  }
  const std::string name = count > 1 ? arguments[1] : "list";
  if (name == "list") {
    for (auto& item : cases) printf("%s\n", item.name);
    return 0;
  }
  if (count > 2 && arguments[2] != std::string("none")) planted = hash(arguments[2]);
  for (auto& item : cases) {
    if (name != item.name) continue;
    for (int i = 3; i < count; ++i) {
      emu::config = parse(arguments[i]);
      try {
        const double error = item.run();
        printf("%s %g\n", error <= 1 ? "ok" : "wrong", error);
      } catch (const emu::Error& error) {
        printf("error %s\n", error.what());
      }
      fflush(stdout);
    }
    return 0;
  }
  fprintf(stderr, "no case %s\n", name.c_str());
  return 2;
}

}  // namespace
}  // namespace zoo

int main(int count, char** arguments) { return zoo::run(count, arguments); }
