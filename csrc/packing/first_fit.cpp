// First-fit bin packing: the Python module llm3d.data._packing. llm3d/data/packing.py has the same in plain Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

namespace py = pybind11;
using Int64s = py::array_t<int64_t, py::array::c_style>;

// rooms[1] is the root of a binary tree, its leaves the bins, each node the largest room below it. A bin that holds
// nothing yet is a leaf like any other. O(n log n), and less where many items in a row are of one length: what fits of
// them goes into a bin at once.
void place(const int64_t* lengths, int64_t n, int64_t capacity, int64_t* bins) {
  // Any two bins hold more than one would, else the second had not been opened.
  const int64_t total = std::accumulate(lengths, lengths + n, int64_t{0});
  const int64_t most_bins = std::min(n, 2 * total / capacity + 1);
  int64_t leaves = 1;
  while (leaves < most_bins) leaves *= 2;
  std::vector<int64_t> rooms(2 * leaves, capacity);

  for (int64_t i = 0; i < n;) {
    const int64_t length = lengths[i];
    int64_t node = 1;
    while (node < leaves) {
      node *= 2;
      node += rooms[node] < length;
    }
    for (; i < n && lengths[i] == length && rooms[node] >= length; i++) {
      bins[i] = node - leaves;
      rooms[node] -= length;
    }
    for (node /= 2; node >= 1; node /= 2) {
      const int64_t largest = std::max(rooms[2 * node], rooms[2 * node + 1]);
      if (rooms[node] == largest) break;
      rooms[node] = largest;
    }
  }
}

Int64s first_fit(const Int64s& lengths, int64_t capacity) {
  const int64_t n = lengths.size();
  Int64s bins(n);
  const int64_t* in = lengths.data();
  int64_t* out = bins.mutable_data();
  {
    const py::gil_scoped_release released;
    place(in, n, capacity, out);
  }
  return bins;
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
  module.def("first_fit", &first_fit, py::arg("lengths").noconvert(), py::arg("capacity"));
}
