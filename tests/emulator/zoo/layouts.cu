// The probes of ptx.cuh, and ldmatrix's bank conflicts, which only the emulator counts.
#include <vector>

#include "ptx_probes.cuh"

namespace zoo {
namespace {

// Rows of `pitch` 16-bit elements: how often eight rows of a matrix fall on the same banks.
template <int pitch, int conflicts>
double conflict_case() {
  Pinned<uint32_t> out(32 * 4);
  const uint64_t before = emu::stats.ldmatrix_conflicts;
  run_probe(ldmatrix_kernel<4, false>, 1, 32, out.data, pitch);
  return emu::stats.ldmatrix_conflicts - before == 4 * conflicts ? 0. : 9.;
}

}  // namespace

extern const std::vector<Case> layout_cases = [] {
  std::vector<Case> cases = {
      {"ldmatrix banks, pitch 8", conflict_case<8, 0>},   {"ldmatrix banks, pitch 32", conflict_case<32, 3>},
      {"ldmatrix banks, pitch 40", conflict_case<40, 0>}, {"ldmatrix banks, pitch 64", conflict_case<64, 7>},
      {"ldmatrix banks, pitch 72", conflict_case<72, 0>},
  };
  cases.insert(cases.end(), std::begin(ptx_cases), std::end(ptx_cases));
  return cases;
}();

}  // namespace zoo
