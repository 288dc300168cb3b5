// Runs every probe of ptx.cuh on a real GPU, to confirm the emulator's twins; with arguments, only the cases so named:
//   nvcc -std=c++20 -arch=native -I../../../csrc/cuda confirm_ptx.cu && ./a.out
#include <cstdio>
#include <exception>
#include <string>

#include "ptx_probes.cuh"

int main(int count, char** names) {
  int failed = 0;
  for (auto& probe : zoo::ptx_cases) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= names[i] == std::string(probe.name);
    if (!wanted) continue;
    double error = -1;
    std::string message;
    try {
      error = probe.run();
    } catch (const std::exception& problem) {
      message = problem.what();
    }
    const bool ok = error >= 0 && error <= 1;
    failed += !ok;
    printf("%-28s %s %g %s\n", probe.name, ok ? "ok" : "FAIL", error, message.c_str());
    fflush(stdout);
  }
  printf("%d failed\n", failed);
  return failed != 0;
}
