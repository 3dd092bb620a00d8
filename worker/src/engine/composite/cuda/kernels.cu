// Training's operations on a GPU, each one pass over memory. All are in single precision, and every sum has one fixed
// order: the threads of a block take strided parts, which are added along a tree. So bits depend on shapes alone.
//
// Matrices are row-major and contiguous. A kernel takes its inputs, then its output, then `Params`. One block of THREADS
// threads works on one row, on one tile of columns, or on THREADS elements, as each kernel says.

#include <stdint.h>

constexpr int THREADS = 256;
constexpr int WARP = 32;
constexpr int WARPS = THREADS / WARP;

struct Params {
  int rows;
  int cols;
  int a;
  int b;
  float x;
};

struct Add {
  static __device__ float identity() { return 0.0f; }
  static __device__ float of(float a, float b) { return a + b; }
};

struct Max {
  static __device__ float identity() { return -INFINITY; }
  static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

// Every thread's value put together; every thread gets the result.
template <typename Op>
__device__ float block(float value) {
  __shared__ float parts[WARPS];
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  // The parts of the call before are read by now.
  __syncthreads();
  if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
  __syncthreads();
  value = threadIdx.x % WARP < WARPS ? parts[threadIdx.x % WARP] : Op::identity();
  for (int offset = WARP / 2; offset > 0; offset /= 2)
    value = Op::of(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ size_t element() { return (size_t)blockIdx.x * THREADS + threadIdx.x; }

__device__ size_t row_start(Params p) { return (size_t)blockIdx.x * p.cols; }

// --- norms: y = (x - mean) / sqrt(variance + eps) * w. RMSNorm (a = 0) has a mean of 0 and the mean square.

// A row's mean and 1 / sqrt(variance + eps). A block for each row.
extern "C" __global__ void norm_stats(const float* x, float* stats, Params p) {
  x += row_start(p);
  float mean = 0.0f;
  if (p.a) {
    float sum = 0.0f;
    for (int c = threadIdx.x; c < p.cols; c += THREADS) sum += x[c];
    mean = block<Add>(sum) / p.cols;
  }
  float squares = 0.0f;
  for (int c = threadIdx.x; c < p.cols; c += THREADS) squares += (x[c] - mean) * (x[c] - mean);
  squares = block<Add>(squares) / p.cols;
  if (threadIdx.x == 0) {
    stats[2 * blockIdx.x] = mean;
    stats[2 * blockIdx.x + 1] = 1.0f / sqrtf(squares + p.x);
  }
}

// A block for each row.
extern "C" __global__ void norm_forward(const float* x, const float* w, const float* stats, float* y, Params p) {
  const float mean = stats[2 * blockIdx.x], scale = stats[2 * blockIdx.x + 1];
  x += row_start(p), y += row_start(p);
  for (int c = threadIdx.x; c < p.cols; c += THREADS) y[c] = (x[c] - mean) * scale * w[c];
}

// dx = (g w - mean(g w) - n mean(g w n)) / sqrt(variance + eps), n the normalised row; RMSNorm without the first mean.
// A block for each row.
extern "C" __global__ void norm_backward(const float* x, const float* w, const float* stats, const float* g, float* dx, Params p) {
  const float mean = stats[2 * blockIdx.x], scale = stats[2 * blockIdx.x + 1];
  x += row_start(p), g += row_start(p), dx += row_start(p);
  float sum = 0.0f, product = 0.0f;
  for (int c = threadIdx.x; c < p.cols; c += THREADS) {
    const float d = g[c] * w[c];
    sum += d;
    product += d * ((x[c] - mean) * scale);
  }
  sum = p.a ? block<Add>(sum) / p.cols : 0.0f;
  product = block<Add>(product) / p.cols;
  for (int c = threadIdx.x; c < p.cols; c += THREADS)
    dx[c] = (g[c] * w[c] - sum - (x[c] - mean) * scale * product) * scale;
}

// The sum of a column over all rows, of what `at` says of each element: WARP columns for each block, whose warps take
// every WARPS-th row.
template <typename At>
__device__ void columns(float* out, Params p, At at) {
  __shared__ float parts[WARPS][WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int c = blockIdx.x * WARP + lane;
  float sum = 0.0f;
  if (c < p.cols)
    for (int r = warp; r < p.rows; r += WARPS) sum += at(r, c);
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= p.cols) return;
  for (int w = 1; w < WARPS; ++w) sum += parts[w][lane];
  out[c] = sum;
}

extern "C" __global__ void norm_weight(const float* x, const float* stats, const float* g, float* dw, Params p) {
  columns(dw, p, [=](int r, int c) {
    const size_t i = (size_t)r * p.cols + c;
    return g[i] * ((x[i] - stats[2 * r]) * stats[2 * r + 1]);
  });
}

extern "C" __global__ void column_sums(const float* g, float* out, Params p) {
  columns(out, p, [=](int r, int c) { return g[(size_t)r * p.cols + c]; });
}

// x + b of each column. A thread for each element.
extern "C" __global__ void bias_forward(const float* x, const float* bias, float* y, Params p) {
  const size_t i = element();
  if (i < (size_t)p.rows * p.cols) y[i] = x[i] + bias[i % p.cols];
}

// The gradient of a table of rows that were looked up: row t of `out` is the sum of the rows `order[ends[t]..ends[t + 1]]`
// of g, in that order. A block for each row of the table.
extern "C" __global__ void embedding_backward(const float* g, const uint32_t* ends, const uint32_t* order, float* out, Params p) {
  const uint32_t from = ends[blockIdx.x], to = ends[blockIdx.x + 1];
  out += row_start(p);
  for (int c = threadIdx.x; c < p.cols; c += THREADS) {
    float sum = 0.0f;
    for (uint32_t i = from; i < to; ++i) sum += g[(size_t)order[i] * p.cols + c];
    out[c] = sum;
  }
}

// --- attention: probabilities of the keys that a query sees, from its segment's first to itself. Rows are
// [samples, heads = a, length = cols] queries; `starts` is [samples, length]; x is the factor of the scores.

struct Seen {
  int first;
  int last;
};

__device__ Seen seen(const uint32_t* starts, Params p) {
  const int query = blockIdx.x % p.cols, sample = blockIdx.x / (p.a * p.cols);
  return {(int)starts[sample * p.cols + query], query};
}

// A block for each row.
extern "C" __global__ void softmax_forward(const float* scores, const uint32_t* starts, float* out, Params p) {
  const Seen keys = seen(starts, p);
  scores += row_start(p), out += row_start(p);
  float most = -INFINITY;
  for (int c = keys.first + threadIdx.x; c <= keys.last; c += THREADS) most = fmaxf(most, scores[c]);
  most = block<Max>(most);
  float sum = 0.0f;
  for (int c = keys.first + threadIdx.x; c <= keys.last; c += THREADS) sum += expf((scores[c] - most) * p.x);
  const float factor = 1.0f / block<Add>(sum);
  for (int c = threadIdx.x; c < p.cols; c += THREADS) {
    const bool in = c >= keys.first && c <= keys.last;
    out[c] = in ? expf((scores[c] - most) * p.x) * factor : 0.0f;
  }
}

// d score = x P (g - sum(P g)). A block for each row.
extern "C" __global__ void softmax_backward(const float* probabilities, const uint32_t* starts, const float* g, float* out, Params p) {
  const Seen keys = seen(starts, p);
  probabilities += row_start(p), g += row_start(p), out += row_start(p);
  float sum = 0.0f;
  for (int c = keys.first + threadIdx.x; c <= keys.last; c += THREADS) sum += probabilities[c] * g[c];
  sum = block<Add>(sum);
  for (int c = threadIdx.x; c < p.cols; c += THREADS) {
    const bool in = c >= keys.first && c <= keys.last;
    out[c] = in ? p.x * probabilities[c] * (g[c] - sum) : 0.0f;
  }
}

// Rotary embedding of [samples, heads = a, length = b, dim = cols]: pairs (i, i + dim / 2) are turned by the angle of
// their token's position; x = -1 turns them back, which is the backward. `cos` and `sin` are [positions, dim / 2].
// A thread for each pair.
extern "C" __global__ void rotate(const float* in, const uint32_t* positions, const float* cos, const float* sin, float* out, Params p) {
  const size_t i = element();
  const int half = p.cols / 2;
  if (i >= (size_t)p.rows * half) return;
  const size_t row = i / half;
  const int c = i % half;
  const size_t sample = row / ((size_t)p.a * p.b);
  const size_t angle = (size_t)positions[sample * p.b + row % p.b] * half + c;
  const float x = in[row * p.cols + c], y = in[row * p.cols + half + c];
  const float u = cos[angle], v = p.x * sin[angle];
  out[row * p.cols + c] = x * u - y * v;
  out[row * p.cols + half + c] = y * u + x * v;
}

// --- activations. A thread for each of `rows` elements.

// GELU by tanh: x / 2 (1 + tanh(s (x + k x^3))), s = sqrt(2 / pi), k = 0.044715.
constexpr float S = 0.7978845608028654f;
constexpr float K = 0.044715f;

extern "C" __global__ void gelu_forward(const float* in, float* out, Params p) {
  const size_t i = element();
  if (i >= p.rows) return;
  const float x = in[i];
  out[i] = 0.5f * x * (1.0f + tanhf(S * (x + K * x * x * x)));
}

extern "C" __global__ void gelu_backward(const float* in, const float* g, float* out, Params p) {
  const size_t i = element();
  if (i >= p.rows) return;
  const float x = in[i];
  const float t = tanhf(S * (x + K * x * x * x));
  out[i] = g[i] * (0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * S * (1.0f + 3.0f * K * x * x));
}

// silu(gate) up, with silu(x) = x / (1 + exp(-x)).
extern "C" __global__ void swiglu_forward(const float* gate, const float* up, float* out, Params p) {
  const size_t i = element();
  if (i < p.rows) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

extern "C" __global__ void swiglu_gate(const float* gate, const float* up, const float* g, float* out, Params p) {
  const size_t i = element();
  if (i >= p.rows) return;
  const float s = 1.0f / (1.0f + expf(-gate[i]));
  out[i] = g[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
}

extern "C" __global__ void swiglu_up(const float* gate, const float* g, float* out, Params p) {
  const size_t i = element();
  if (i < p.rows) out[i] = g[i] * (gate[i] / (1.0f + expf(-gate[i])));
}

// --- cross entropy: weight (log sum exp(row) - row[target]). A block for each row.

__device__ float log_sum(const float* row, int cols) {
  float most = -INFINITY;
  for (int c = threadIdx.x; c < cols; c += THREADS) most = fmaxf(most, row[c]);
  most = block<Max>(most);
  float sum = 0.0f;
  for (int c = threadIdx.x; c < cols; c += THREADS) sum += expf(row[c] - most);
  return most + logf(block<Add>(sum));
}

extern "C" __global__ void loss_forward(const float* logits, const uint32_t* targets, const float* weights, float* out, Params p) {
  const float weight = weights[blockIdx.x];
  logits += row_start(p);
  const float total = weight == 0.0f ? 0.0f : log_sum(logits, p.cols);
  if (threadIdx.x == 0) out[blockIdx.x] = weight == 0.0f ? 0.0f : weight * (total - logits[targets[blockIdx.x]]);
}

// g weight (softmax - one at the target).
extern "C" __global__ void loss_backward(const float* logits, const uint32_t* targets, const float* weights, const float* g, float* out, Params p) {
  const float factor = weights[blockIdx.x] * g[blockIdx.x];
  logits += row_start(p), out += row_start(p);
  if (factor == 0.0f) {
    for (int c = threadIdx.x; c < p.cols; c += THREADS) out[c] = 0.0f;
    return;
  }
  const float total = log_sum(logits, p.cols);
  const int target = targets[blockIdx.x];
  for (int c = threadIdx.x; c < p.cols; c += THREADS)
    out[c] = factor * (expf(logits[c] - total) - (c == target ? 1.0f : 0.0f));
}
