#pragma once
#include "common.h"

namespace fastdl {

enum Mode { rnn_tanh, rnn_relu, lstm, gru, mode_count };

// Sequences whose rows lie step after step, the longest sequence first
struct Sequence {
  const int64_t* batch_sizes;  // [steps], decreasing: sequences that have the step; null: all
  int64_t rows, batch, steps;
  int64_t hidden, state;  // sizes of c and h
  bool reverse;           // from the last step of each sequence to its first
};

// One layer in one direction; G gates: 1 of rnn, 4 of lstm (i f g o), 3 of gru (r z n)
struct RecurrenceArguments {
  int dtype, mode;
  Sequence sequence;
  const void* projected;  // [rows, G * hidden]: the input's part of the gates, with biases
  const void* hx;         // [batch, state]
  const void* cx;         // [batch, hidden], lstm
  const void* weight_hh;  // [G * hidden, state]
  const void* bias_hn;    // [hidden] or null, gru
  const void* weight_hr;  // [state, hidden] or null, lstm
  void* output;           // [rows, state]
  void* h_n;              // [batch, state]
  void* c_n;              // [batch, hidden], lstm
  void* gates;            // [rows, 4 * hidden] or null: lstm's i f g o, gru's r z n and the product inside n
  void* cells;            // [rows, hidden] or null: lstm's c
  void* workspace;        // as recurrence_workspace asks
  int threads;
};

struct RecurrenceBackwardArguments {
  int dtype, mode;
  Sequence sequence;
  const void* grad_output;                                               // [rows, state] or null
  const void* grad_h_n;                                                  // [batch, state] or null
  const void* grad_c_n;                                                  // [batch, hidden] or null
  const void *output, *hx, *cx, *weight_hh, *weight_hr, *gates, *cells;  // as above
  void* grad_projected;                                                  // [rows, G * hidden]
  void* grad_hidden_n;                                                   // [rows, hidden], gru: of the product inside n
  void* grad_hx;                                                         // [batch, state]
  void* grad_cx;                                                         // [batch, hidden], lstm
  void* grad_projection;  // [rows, state], with weight_hr: the whole gradient of h
  void* workspace;
  int threads;
};

// h, c = one step from hx, cx
struct CellArguments {
  int dtype, mode;
  const void* input;              // [batch, input_size]
  const void* hx;                 // [batch, hidden]
  const void* cx;                 // [batch, hidden], lstm
  const void* weight_ih;          // [G * hidden, input_size]
  const void* weight_hh;          // [G * hidden, hidden]
  const void *bias_ih, *bias_hh;  // [G * hidden] or null
  void* h;                        // [batch, hidden]
  void* c;                        // [batch, hidden], lstm
  void* gates;                    // [batch, 4 * hidden] or null
  int64_t batch, input_size, hidden;
  int threads;
};

struct CellBackwardArguments {
  int dtype, mode;
  const void *grad_h, *grad_c;  // [batch, hidden] or null
  const void* before;           // [batch, hidden]: lstm's cx, gru's hx
  const void* after;            // [batch, hidden]: lstm's c, rnn's h
  const void* gates;            // [batch, 4 * hidden], lstm and gru
  void* grad_gates_input;       // [batch, G * hidden]
  void* grad_gates_hidden;      // [batch, G * hidden], gru
  void* grad_before;            // [batch, hidden]: of lstm's cx, and gru's hx, products aside
  int64_t batch, hidden;
  int threads;
};

#define FASTDL_CPU_RNN(KERNEL)                                                                            \
  KERNEL(void, recurrence, (const RecurrenceArguments&))                                                  \
  KERNEL(int64_t, recurrence_workspace, (int dtype, int mode, const Sequence&, bool projection))          \
  KERNEL(void, recurrence_backward, (const RecurrenceBackwardArguments&))                                 \
  KERNEL(int64_t, recurrence_backward_workspace, (int dtype, int mode, const Sequence&, bool projection)) \
  KERNEL(void, recurrent_cell, (const CellArguments&))                                                    \
  KERNEL(void, recurrent_cell_backward, (const CellBackwardArguments&))

}  // namespace fastdl
