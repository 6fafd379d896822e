/* The demo's transformer on one processor core: rates and gradients of answers, sampling, and the update.

   Each question is passed once for all attempts at it, and no token after an answer's end is passed at all. A batch is
   a list of rows (tokens that are passed); a row attends to the places of its question up to itself, and to its own
   answer up to itself. Only rows that predict an answer's token go through the end of the last layer and the head.

   Widths are multiples of 16 and heads of 8, which `native.py` checks. Gradients are sums over rows in a fixed order. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef int i8 __attribute__((vector_size(32), aligned(4), may_alias));

#define PANEL 16
#define CHUNK_ROWS 384
#define PAD 0
#define END 1

typedef struct { int vocabulary, width, heads, layers, question, answer; } Dims;

typedef struct {
  float *norm1, *shift1, *norm2, *shift2, *qkv, *qkv_bias, *out, *out_bias, *up, *up_bias, *down, *down_bias;
} Block;

typedef struct { float *tokens, *positions, *norm, *shift, *head, *head_bias; Block block[16]; } Net;

static Net net_of(const Dims *s, float *at) {
  Net net;
  const long d = s->width;
#define TAKE(field, n) field = at, at += (n)
  TAKE(net.tokens, s->vocabulary * d);
  TAKE(net.positions, (s->question + s->answer) * d);
  for (int l = 0; l < s->layers; l++) {
    Block *b = &net.block[l];
    TAKE(b->norm1, d); TAKE(b->shift1, d); TAKE(b->norm2, d); TAKE(b->shift2, d);
    TAKE(b->qkv, 3 * d * d); TAKE(b->qkv_bias, 3 * d);
    TAKE(b->out, d * d); TAKE(b->out_bias, d);
    TAKE(b->up, 4 * d * d); TAKE(b->up_bias, 4 * d);
    TAKE(b->down, 4 * d * d); TAKE(b->down_bias, d);
  }
  TAKE(net.norm, d); TAKE(net.shift, d);
  TAKE(net.head, s->vocabulary * d); TAKE(net.head_bias, s->vocabulary);
  return net;
}

static long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }
static float *floats(long n) { return malloc(sizeof(float) * (n > 0 ? n : 1)); }

/* Eight values at a time. */

static inline v8 all(float x) { return (v8){x, x, x, x, x, x, x, x}; }
static inline v8 least(v8 a, v8 b) { i8 m = a < b; return (v8)((m & (i8)a) | (~m & (i8)b)); }
static inline v8 most(v8 a, v8 b) { i8 m = a > b; return (v8)((m & (i8)a) | (~m & (i8)b)); }
static inline float sum8(v8 a) { return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7])); }

static inline v8 exp8(v8 x) {
  x = most(least(x, all(88.0f)), all(-87.0f));
  v8 scaled = x * 1.44269504f;
  i8 n = __builtin_convertvector(scaled + (v8)(((i8)scaled & (int)0x80000000) | (i8)all(0.5f)), i8);
  v8 whole = __builtin_convertvector(n, v8);
  v8 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  v8 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r * r + r + 1.0f) * (v8)((n + 127) << 23);
}

/* GELU x Phi(x) and its derivative; erf by Abramowitz and Stegun 7.1.26, off by at most 1.5e-7. */
static inline v8 gelu8(v8 x, v8 *slope) {
  i8 sign = (i8)x & (int)0x80000000;
  v8 z = (v8)((i8)x ^ sign) * 0.70710678f;
  v8 t = 1.0f / (1.0f + 0.3275911f * z), e = exp8(-z * z);
  v8 tail = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t * e;
  v8 erf = (v8)((i8)(1.0f - tail) ^ sign);
  v8 below = 0.5f + 0.5f * erf;
  *slope = below + 0.39894228f * x * e;
  return x * below;
}

/* Matrix products: C [m, n] = A [m, k] B [k, n]. A is read with any strides, B from panels of 16 columns. */

static void pack(float *to, const float *b, long k, long n, long row, long column) {
  for (long j = 0; j < padded(n); j += PANEL)
    for (long p = 0; p < k; p++)
      for (long c = j; c < j + PANEL; c++) *to++ = c < n ? b[p * row + c * column] : 0.0f;
}

#define KERNEL(R)                                                                                                   \
  static void kernel##R(long k, const float *a, long row, long column, const float *b, float *c, long c_row,        \
                        const float *bias, int adds) {                                                              \
    v8 sum[R][2];                                                                                                   \
    _Pragma("GCC unroll 6") for (int i = 0; i < R; i++) sum[i][0] = sum[i][1] = all(0.0f);                          \
    for (long p = 0; p < k; p++, b += PANEL, a += column) {                                                         \
      v8 first = *(const v8 *)b, second = *(const v8 *)(b + 8);                                                     \
      _Pragma("GCC unroll 6") for (int i = 0; i < R; i++) {                                                         \
        v8 x = all(a[i * row]);                                                                                     \
        sum[i][0] += x * first;                                                                                     \
        sum[i][1] += x * second;                                                                                    \
      }                                                                                                             \
    }                                                                                                               \
    _Pragma("GCC unroll 6") for (int i = 0; i < R; i++) for (int h = 0; h < 2; h++) {                               \
      v8 *at = (v8 *)(c + i * c_row + 8 * h);                                                                       \
      v8 value = sum[i][h];                                                                                         \
      if (bias) value += *(const v8 *)(bias + 8 * h);                                                               \
      if (adds) value += *at;                                                                                       \
      *at = value;                                                                                                  \
    }                                                                                                               \
  }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6)

typedef void Kernel(long, const float *, long, long, const float *, float *, long, const float *, int);
static Kernel *const KERNELS[] = {0, kernel1, kernel2, kernel3, kernel4, kernel5, kernel6};

static void product(long m, long n, long k, const float *a, long row, long column, const float *panels, float *c,
                    long c_row, const float *bias, int adds) {
  for (long j = 0; j < n; j += PANEL)
    for (long i = 0; i < m; i += 6)
      KERNELS[m - i < 6 ? m - i : 6](k, a + i * row, row, column, panels + j * k, c + i * c_row + j, c_row,
                                     bias ? bias + j : 0, adds);
}

/* dW [n, k] += dY [m, n]' X [m, k], and the bias's sum of rows. */
static void weigh(float *dw, float *dbias, const float *dy, long dy_row, const float *x, long m, long n, long k,
                  float *room) {
  pack(room, x, m, k, k, 1);
  product(n, k, m, dy, 1, dy_row, room, dw, k, 0, 1);
  for (long i = 0; i < m; i++)
    for (long j = 0; j < n; j++) dbias[j] += dy[i * dy_row + j];
}

/* The weights as panels: `to` for passes towards the output, `back` for gradients (or null). */
typedef struct { float *qkv, *out, *up, *down; } BlockPanels;
typedef struct { BlockPanels to[16], back[16]; float *head_to, *head_back, *head_bias; } Panels;

static float *packed(const float *w, long n, long k, int back) {
  float *to = floats(back ? n * padded(k) : k * padded(n));
  if (back) pack(to, w, n, k, k, 1);
  else pack(to, w, k, n, 1, k);
  return to;
}

static Panels panels_of(const Dims *s, const Net *net, int back) {
  Panels p;
  const long d = s->width;
  for (int way = 0; way <= back; way++)
    for (int l = 0; l < s->layers; l++) {
      BlockPanels *b = way ? &p.back[l] : &p.to[l];
      b->qkv = packed(net->block[l].qkv, 3 * d, d, way);
      b->out = packed(net->block[l].out, d, d, way);
      b->up = packed(net->block[l].up, 4 * d, d, way);
      b->down = packed(net->block[l].down, d, 4 * d, way);
    }
  p.head_to = packed(net->head, s->vocabulary, d, 0);
  p.head_back = back ? packed(net->head, s->vocabulary, d, 1) : 0;
  p.head_bias = calloc(padded(s->vocabulary), sizeof(float));
  memcpy(p.head_bias, net->head_bias, sizeof(float) * s->vocabulary);
  return p;
}

static void free_panels(const Dims *s, Panels *p) {
  for (int way = 0; way <= (p->head_back != 0); way++)
    for (int l = 0; l < s->layers; l++) {
      BlockPanels *b = way ? &p->back[l] : &p->to[l];
      free(b->qkv); free(b->out); free(b->up); free(b->down);
    }
  free(p->head_to); free(p->head_back); free(p->head_bias);
}

/* Layer norm of rows: what was standardised, 1 / standard deviation, and the result. */
static void normalise(const float *x, long rows, long d, const float *scale, const float *shift, float *standard,
                      float *inverse, float *y) {
  for (long r = 0; r < rows; r++, x += d, standard += d, y += d) {
    v8 total = all(0.0f), squares = all(0.0f);
    for (long i = 0; i < d; i += 8) total += *(const v8 *)(x + i);
    const float mean = sum8(total) / d;
    for (long i = 0; i < d; i += 8) { v8 c = *(const v8 *)(x + i) - mean; squares += c * c; }
    inverse[r] = 1.0f / sqrtf(sum8(squares) / d + 1e-5f);
    for (long i = 0; i < d; i += 8) {
      v8 z = (*(const v8 *)(x + i) - mean) * inverse[r];
      *(v8 *)(standard + i) = z;
      *(v8 *)(y + i) = z * *(const v8 *)(scale + i) + *(const v8 *)(shift + i);
    }
  }
}

/* The result of `normalise` again. */
static void rescale(const float *standard, long rows, long d, const float *scale, const float *shift, float *y) {
  for (long r = 0; r < rows; r++, standard += d, y += d)
    for (long i = 0; i < d; i += 8)
      *(v8 *)(y + i) = *(const v8 *)(standard + i) * *(const v8 *)(scale + i) + *(const v8 *)(shift + i);
}

/* dx += gradient through `normalise`. */
static void normalise_back(const float *dy, const float *standard, const float *inverse, long rows, long d,
                           const float *scale, float *dscale, float *dshift, float *dx) {
  for (long r = 0; r < rows; r++, dy += d, standard += d, dx += d) {
    v8 total = all(0.0f), along = all(0.0f);
    for (long i = 0; i < d; i += 8) {
      v8 g = *(const v8 *)(dy + i), z = *(const v8 *)(standard + i), dz = g * *(const v8 *)(scale + i);
      *(v8 *)(dscale + i) += g * z;
      *(v8 *)(dshift + i) += g;
      total += dz;
      along += dz * z;
    }
    const float mean = sum8(total) / d, part = sum8(along) / d;
    for (long i = 0; i < d; i += 8) {
      v8 z = *(const v8 *)(standard + i), dz = *(const v8 *)(dy + i) * *(const v8 *)(scale + i);
      *(v8 *)(dx + i) += (dz - mean - z * part) * inverse[r];
    }
  }
}

/* Attention of one row. Keys and values lie in rows of queries, keys and values, 3 d long: `n_asked` of the question
   from `asked` on, then `n_own` of the answer from `own` on. */
typedef struct { const float *asked, *own; int n_asked, n_own; } Seen;

static const float *seen_row(const Seen *s, int j, long d) {
  return j < s->n_asked ? s->asked + 3 * d * j : s->own + 3 * d * (j - s->n_asked);
}

static void weights_of(const float *q, const Seen *s, long d, long h, long size, float *weights) {
  const int n = s->n_asked + s->n_own, n_padded = (n + 7) / 8 * 8;
  const float scale = 1.0f / sqrtf((float)size);
  float best = -INFINITY;
  for (int j = 0; j < n; j++) {
    const float *k = seen_row(s, j, d) + d + h * size;
    v8 dot = all(0.0f);
    for (long i = 0; i < size; i += 8) dot += *(const v8 *)(q + h * size + i) * *(const v8 *)(k + i);
    weights[j] = sum8(dot) * scale;
    if (weights[j] > best) best = weights[j];
  }
  for (int j = n; j < n_padded; j++) weights[j] = -INFINITY;
  v8 total = all(0.0f);
  for (int j = 0; j < n_padded; j += 8) {
    v8 e = exp8(*(v8 *)(weights + j) - best);
    *(v8 *)(weights + j) = e;
    for (int c = 0; c < 8; c++) if (j + c >= n) e[c] = 0.0f;
    total += e;
  }
  const float inverse = 1.0f / sum8(total);
  for (int j = 0; j < n; j++) weights[j] *= inverse;
}

static void attend(const float *row, const Seen *s, long d, int heads, float *to) {
  float weights[512];
  const long size = d / heads;
  const int n = s->n_asked + s->n_own;
  for (int h = 0; h < heads; h++) {
    weights_of(row, s, d, h, size, weights);
    for (long i = 0; i < size; i += 8) {
      v8 sum = all(0.0f);
      for (int j = 0; j < n; j++) sum += weights[j] * *(const v8 *)(seen_row(s, j, d) + 2 * d + h * size + i);
      *(v8 *)(to + h * size + i) = sum;
    }
  }
}

/* Gradient through `attend`, added to the rows in `d_qkv`, which lie there as the seen ones do in `qkv`. */
static void attend_back(const float *row, const Seen *s, long d, int heads, const float *d_to, const float *qkv,
                        float *d_qkv) {
  float weights[512], d_weights[512];
  const long size = d / heads;
  const float scale = 1.0f / sqrtf((float)size);
  const int n = s->n_asked + s->n_own;
  float *d_row = d_qkv + (row - qkv);
  for (int h = 0; h < heads; h++) {
    const float *g = d_to + h * size;
    weights_of(row, s, d, h, size, weights);
    float mean = 0.0f;
    for (int j = 0; j < n; j++) {
      const float *v = seen_row(s, j, d) + 2 * d + h * size;
      v8 dot = all(0.0f);
      for (long i = 0; i < size; i += 8) dot += *(const v8 *)(g + i) * *(const v8 *)(v + i);
      d_weights[j] = sum8(dot);
      mean += weights[j] * d_weights[j];
    }
    for (int j = 0; j < n; j++) {
      const float *k = seen_row(s, j, d) + d + h * size, slope = weights[j] * (d_weights[j] - mean) * scale;
      float *d_k = d_qkv + (k - qkv), *d_v = d_k + d;
      for (long i = 0; i < size; i += 8) {
        *(v8 *)(d_row + h * size + i) += slope * *(const v8 *)(k + i);
        *(v8 *)(d_k + i) += slope * *(const v8 *)(row + h * size + i);
        *(v8 *)(d_v + i) += weights[j] * *(const v8 *)(g + i);
      }
    }
  }
}

static void activate(const float *u, long n, float *y) {
  v8 slope;
  for (long i = 0; i < n; i += 8) *(v8 *)(y + i) = gelu8(*(const v8 *)(u + i), &slope);
}

static void activate_back(const float *u, long n, float *dy) {
  for (long i = 0; i < n; i += 8) {
    v8 slope;
    gelu8(*(const v8 *)(u + i), &slope);
    *(v8 *)(dy + i) *= slope;
  }
}

/* log sum exp of a row of logits, and where asked the probabilities in their place; the padding is never read. */
static float normaliser(float *logits, long n, int to_probabilities) {
  float best = -INFINITY;
  for (long i = 0; i < n; i++) if (logits[i] > best) best = logits[i];
  for (long i = n; i < padded(n); i++) logits[i] = -INFINITY;
  v8 total = all(0.0f);
  for (long i = 0; i < padded(n); i += 8) {
    v8 e = exp8(*(v8 *)(logits + i) - best);
    if (to_probabilities) *(v8 *)(logits + i) = e;
    total += e;
  }
  float sum = sum8(total);
  if (to_probabilities) for (long i = 0; i < padded(n); i++) logits[i] = i < n ? logits[i] / sum : 0.0f;
  return best + logf(sum);
}

/* Rows of some problems and their answers, and which of them predict what. */
typedef struct {
  int n, n_read;
  int *token, *position, *asked, *n_asked, *own;   /* [n]; where the rows that a row sees begin */
  int *read, *first_target, *target, *attempt;     /* [n_read + 1], targets of read row i: first[i] .. first[i + 1] */
} Rows;

typedef struct { float *standard1, *inverse1, *qkv, *seen, *standard2, *inverse2, *up, *active; } Kept;

static Seen seen_by(const Rows *rows, int r, const float *qkv, long d) {
  return (Seen){qkv + 3 * d * rows->asked[r], qkv + 3 * d * rows->own[r], rows->n_asked[r],
                r >= rows->own[r] ? r - rows->own[r] + 1 : 0};
}

static void embed(const Dims *s, const Net *net, int token, int position, float *x) {
  const long d = s->width;
  for (long i = 0; i < d; i++) x[i] = net->tokens[token * d + i] + net->positions[position * d + i];
}

static void feed(const Block *w, const BlockPanels *p, long rows, long d, const float *seen, float *x, float *standard,
                 float *inverse, float *up, float *active, float *room) {
  product(rows, d, d, seen, d, 1, p->out, x, d, w->out_bias, 1);
  normalise(x, rows, d, w->norm2, w->shift2, standard, inverse, room);
  product(rows, 4 * d, d, room, d, 1, p->up, up, 4 * d, w->up_bias, 0);
  activate(up, rows * 4 * d, active);
  product(rows, d, 4 * d, active, 4 * d, 1, p->down, x, d, w->down_bias, 1);
}

/* Forward pass; x [n, d] holds the embedded rows and ends as the n_read ones before the last norm. */
static void forward(const Dims *s, const Net *net, const Panels *p, const Rows *rows, float *x, Kept *kept, float *room) {
  const long d = s->width;
  for (int l = 0; l < s->layers; l++) {
    const Block *w = &net->block[l];
    Kept *k = &kept[l];
    const int is_last = l + 1 == s->layers, n = is_last ? rows->n_read : rows->n;
    normalise(x, rows->n, d, w->norm1, w->shift1, k->standard1, k->inverse1, room);
    product(rows->n, 3 * d, d, room, d, 1, p->to[l].qkv, k->qkv, 3 * d, w->qkv_bias, 0);
    for (int i = 0; i < n; i++) {
      const int r = is_last ? rows->read[i] : i;
      const Seen seen = seen_by(rows, r, k->qkv, d);
      attend(k->qkv + 3 * d * r, &seen, d, s->heads, k->seen + d * i);
      if (is_last && r != i) memcpy(x + d * i, x + d * r, sizeof(float) * d);
    }
    feed(w, &p->to[l], n, d, k->seen, x, k->standard2, k->inverse2, k->up, k->active, room);
  }
}

static void backward(const Dims *s, const Net *net, const Panels *p, const Rows *rows, const Kept *kept,
                     const float *last, const float *last_inverse, const float *d_logits, Net *grad, float *room) {
  const long d = s->width, vp = padded(s->vocabulary);
  float *y = floats(rows->n * d), *dx = calloc(rows->n * d, sizeof(float)), *dy = floats(rows->n * 4 * d);
  float *d_qkv = floats(rows->n * 3 * d);
  rescale(last, rows->n_read, d, net->norm, net->shift, y);
  weigh(grad->head, grad->head_bias, d_logits, vp, y, rows->n_read, s->vocabulary, d, room);
  product(rows->n_read, d, s->vocabulary, d_logits, vp, 1, p->head_back, dy, d, 0, 0);
  normalise_back(dy, last, last_inverse, rows->n_read, d, net->norm, grad->norm, grad->shift, dx);
  for (int l = s->layers - 1; l >= 0; l--) {
    const Block *w = &net->block[l];
    Block *g = &grad->block[l];
    const Kept *k = &kept[l];
    const int is_last = l + 1 == s->layers, n = is_last ? rows->n_read : rows->n;
    weigh(g->down, g->down_bias, dx, d, k->active, n, d, 4 * d, room);
    product(n, 4 * d, d, dx, d, 1, p->back[l].down, dy, 4 * d, 0, 0);
    activate_back(k->up, n * 4 * d, dy);
    rescale(k->standard2, n, d, w->norm2, w->shift2, y);
    weigh(g->up, g->up_bias, dy, 4 * d, y, n, 4 * d, d, room);
    product(n, d, 4 * d, dy, 4 * d, 1, p->back[l].up, y, d, 0, 0);
    normalise_back(y, k->standard2, k->inverse2, n, d, w->norm2, g->norm2, g->shift2, dx);
    weigh(g->out, g->out_bias, dx, d, k->seen, n, d, d, room);
    product(n, d, d, dx, d, 1, p->back[l].out, dy, d, 0, 0);
    memset(d_qkv, 0, sizeof(float) * rows->n * 3 * d);
    for (int i = 0; i < n; i++) {
      const int r = is_last ? rows->read[i] : i;
      const Seen seen = seen_by(rows, r, k->qkv, d);
      attend_back(k->qkv + 3 * d * r, &seen, d, s->heads, dy + d * i, k->qkv, d_qkv);
    }
    if (is_last) /* back to all rows, from the end, for row i moves to read[i] >= i */
      for (int i = n - 1, r = rows->n - 1; r >= 0; r--) {
        if (i >= 0 && rows->read[i] == r) { if (r != i) memcpy(dx + d * r, dx + d * i, sizeof(float) * d); i--; }
        else memset(dx + d * r, 0, sizeof(float) * d);
      }
    rescale(k->standard1, rows->n, d, w->norm1, w->shift1, y);
    weigh(g->qkv, g->qkv_bias, d_qkv, 3 * d, y, rows->n, 3 * d, d, room);
    product(rows->n, d, 3 * d, d_qkv, 3 * d, 1, p->back[l].qkv, y, d, 0, 0);
    normalise_back(y, k->standard1, k->inverse1, rows->n, d, w->norm1, g->norm1, g->shift1, dx);
  }
  for (int r = 0; r < rows->n; r++)
    for (long i = 0; i < d; i++) {
      grad->tokens[rows->token[r] * d + i] += dx[r * d + i];
      grad->positions[rows->position[r] * d + i] += dx[r * d + i];
    }
  free(y); free(dx); free(dy); free(d_qkv);
}

static Kept *kept_of(const Dims *s, long n) {
  const long d = s->width;
  Kept *kept = malloc(sizeof(Kept) * s->layers);
  for (int l = 0; l < s->layers; l++)
    kept[l] = (Kept){floats(n * d), floats(n), floats(n * 3 * d), floats(n * d),
                     floats(n * d), floats(n), floats(n * 4 * d), floats(n * 4 * d)};
  return kept;
}

static void free_kept(const Dims *s, Kept *kept) {
  for (int l = 0; l < s->layers; l++) {
    Kept *k = &kept[l];
    free(k->standard1); free(k->inverse1); free(k->qkv); free(k->seen);
    free(k->standard2); free(k->inverse2); free(k->up); free(k->active);
  }
  free(kept);
}

static Rows rows_of(long n, long n_targets) {
  return (Rows){0, 0, malloc(4 * n), malloc(4 * n), malloc(4 * n), malloc(4 * n), malloc(4 * n),
                malloc(4 * n), malloc(4 * (n + 1)), malloc(4 * n_targets), malloc(4 * n_targets)};
}

static void free_rows(Rows *r) {
  free(r->token); free(r->position); free(r->asked); free(r->n_asked); free(r->own);
  free(r->read); free(r->first_target); free(r->target); free(r->attempt);
}

static void add_row(Rows *rows, int token, int position, int asked, int n_asked, int own) {
  const int r = rows->n++;
  rows->token[r] = token, rows->position[r] = position;
  rows->asked[r] = asked, rows->n_asked[r] = n_asked, rows->own[r] = own;
}

/* Add a problem's question, and its answers' tokens but the last one. Answers end with END or at their full length. */
static void add_problem(const Dims *s, Rows *rows, const int *question, const int *answers, int attempts, int first) {
  const int asked = rows->n;
  int n_targets = rows->first_target[rows->n_read];
  for (int i = 0; i < s->question; i++) add_row(rows, question[i], i, asked, i + 1, rows->n + 1);
  rows->read[rows->n_read] = rows->n - 1;
  for (int a = 0; a < attempts; a++) {
    rows->target[n_targets] = answers[a * s->answer], rows->attempt[n_targets++] = first + a;
  }
  rows->first_target[++rows->n_read] = n_targets;
  for (int a = 0; a < attempts; a++) {
    const int *answer = answers + a * s->answer, own = rows->n;
    for (int i = 0; i + 1 < s->answer && answer[i + 1] != PAD; i++) {
      rows->read[rows->n_read] = rows->n;
      add_row(rows, answer[i], s->question + i, asked, s->question, own);
      rows->target[n_targets] = answer[i + 1], rows->attempt[n_targets++] = first + a;
      rows->first_target[++rows->n_read] = n_targets;
    }
  }
}

/* Log probability of each answer, [n, attempts]; with weights, add the gradient of sum weights x log probability. */
void log_probabilities(const Dims *s, float *parameters, int n, int attempts, const int *questions, const int *answers,
                       const float *weights, float *log_p, float *gradient) {
  const long d = s->width, v = s->vocabulary, vp = padded(v), per_problem = s->question + (long)attempts * s->answer;
  const long most = CHUNK_ROWS > per_problem ? CHUNK_ROWS : per_problem;
  const Net net = net_of(s, parameters);
  Net grad = net_of(s, gradient);
  Panels p = panels_of(s, &net, weights != 0);
  Kept *kept = kept_of(s, most);
  Rows rows = rows_of(most, most + (long)attempts * most);
  float *x = floats(most * d), *standard = floats(most * d), *inverse = floats(most), *logits = floats(most * vp);
  float *room = floats(padded(most) * 4 * d + d * vp);
  memset(log_p, 0, sizeof(float) * n * attempts);
  for (int done = 0; done < n;) {
    rows.n = rows.n_read = 0, rows.first_target[0] = 0;
    while (done < n && rows.n + per_problem <= most) {
      add_problem(s, &rows, questions + (long)done * s->question, answers + (long)done * attempts * s->answer, attempts,
                  done * attempts);
      done++;
    }
    for (int r = 0; r < rows.n; r++) embed(s, &net, rows.token[r], rows.position[r], x + d * r);
    forward(s, &net, &p, &rows, x, kept, room);
    normalise(x, rows.n_read, d, net.norm, net.shift, standard, inverse, room);
    product(rows.n_read, vp, d, room, d, 1, p.head_to, logits, vp, p.head_bias, 0);
    for (int i = 0; i < rows.n_read; i++) {
      float *row = logits + i * vp, total = 0.0f;
      const int first = rows.first_target[i], end = rows.first_target[i + 1];
      for (int t = first; t < end; t++) log_p[rows.attempt[t]] += row[rows.target[t]];
      const float norm = normaliser(row, v, weights != 0);
      for (int t = first; t < end; t++) log_p[rows.attempt[t]] -= norm;
      if (!weights) continue;
      for (int t = first; t < end; t++) total += weights[rows.attempt[t]];
      for (long j = 0; j < v; j++) row[j] *= -total;
      for (int t = first; t < end; t++) row[rows.target[t]] += weights[rows.attempt[t]];
    }
    if (weights) backward(s, &net, &p, &rows, kept, standard, inverse, logits, &grad, room);
  }
  free(x); free(standard); free(inverse); free(logits); free(room);
  free_rows(&rows); free_kept(s, kept); free_panels(s, &p);
}

static int drawn(float *logits, long n, float level) {
  normaliser(logits, n, 1);
  float below = 0.0f;
  for (long i = 0; i < n; i++) if ((below += logits[i]) > level) return (int)i;
  for (long i = n - 1; i > 0; i--) if (logits[i] > 0.0f) return (int)i; /* rounding left a little above the last */
  return 0;
}

/* Answers at temperature 1, each until END. `levels` [n, attempts, answer] in [0, 1) decide the draws. */
void sample(const Dims *s, float *parameters, int n, int attempts, const int *questions, const float *levels,
            int *answers) {
  const long d = s->width, v = s->vocabulary, vp = padded(v), n_asked = (long)n * s->question, all_n = n * attempts;
  const long most = n_asked > all_n ? n_asked : all_n;
  const Net net = net_of(s, parameters);
  Panels p = panels_of(s, &net, 0);
  Kept *kept = kept_of(s, most);
  Rows rows = rows_of(most, most);
  float *x = floats(most * d), *standard = floats(most * d), *inverse = floats(most), *logits = floats(most * vp);
  float *room = floats(most * 4 * d), *first = floats(n * vp), *qkv = floats(all_n * 3 * d), *seen = floats(all_n * d);
  float *cache = floats(s->layers * all_n * s->answer * 3 * d);
  int *open = malloc(sizeof(int) * all_n), n_open = 0;
  for (int q = 0; q < n; q++) {
    for (int i = 0; i < s->question; i++) {
      const int asked = q * s->question;
      add_row(&rows, questions[asked + i], i, asked, i + 1, rows.n + 1);
    }
    rows.read[rows.n_read++] = rows.n - 1;
  }
  for (int r = 0; r < rows.n; r++) embed(s, &net, rows.token[r], rows.position[r], x + d * r);
  forward(s, &net, &p, &rows, x, kept, room);
  normalise(x, n, d, net.norm, net.shift, standard, inverse, room);
  product(n, vp, d, room, d, 1, p.head_to, first, vp, p.head_bias, 0);
  memset(answers, 0, sizeof(int) * all_n * s->answer);
  for (int a = 0; a < all_n; a++) {
    memcpy(logits, first + a / attempts * vp, sizeof(float) * vp);
    answers[a * s->answer] = drawn(logits, v, levels[a * s->answer]);
    if (answers[a * s->answer] != END) open[n_open++] = a;
  }
  for (int t = 0; t + 1 < s->answer && n_open; t++) { /* pass token t of each open answer, draw token t + 1 */
    for (int i = 0; i < n_open; i++) embed(s, &net, answers[open[i] * s->answer + t], s->question + t, x + d * i);
    for (int l = 0; l < s->layers; l++) {
      const Block *w = &net.block[l];
      Kept *k = &kept[l];
      normalise(x, n_open, d, w->norm1, w->shift1, standard, inverse, room);
      product(n_open, 3 * d, d, room, d, 1, p.to[l].qkv, qkv, 3 * d, w->qkv_bias, 0);
      for (int i = 0; i < n_open; i++) {
        float *own = cache + ((long)l * all_n + open[i]) * s->answer * 3 * d;
        memcpy(own + 3 * d * t, qkv + 3 * d * i, sizeof(float) * 3 * d);
        const Seen around = {k->qkv + 3 * d * (open[i] / attempts) * s->question, own, s->question, t + 1};
        attend(qkv + 3 * d * i, &around, d, s->heads, seen + d * i);
      }
      feed(w, &p.to[l], n_open, d, seen, x, standard, inverse, k->up, k->active, room);
    }
    normalise(x, n_open, d, net.norm, net.shift, standard, inverse, room);
    product(n_open, vp, d, room, d, 1, p.head_to, logits, vp, p.head_bias, 0);
    int still = 0;
    for (int i = 0; i < n_open; i++) {
      const long at = (long)open[i] * s->answer + t + 1;
      answers[at] = drawn(logits + i * vp, v, levels[at]);
      if (answers[at] != END) open[still++] = open[i];
    }
    n_open = still;
  }
  free(x); free(standard); free(inverse); free(logits); free(room); free(first); free(qkv); free(seen); free(cache);
  free(open); free_rows(&rows); free_kept(s, kept); free_panels(s, &p);
}

/* One step of Adam without weight decay, the gradient clipped to norm 1. `t` counts from 1. */
void update(long n, float *parameters, const float *gradient, float *mean, float *square, int t, double rate) {
  const double decay1 = 0.9, decay2 = 0.95;
  double norm = 0.0;
  for (long i = 0; i < n; i++) norm += (double)gradient[i] * gradient[i];
  norm = sqrt(norm);
  const float clip = norm + 1e-6 > 1.0 ? (float)(1.0 / (norm + 1e-6)) : 1.0f;
  const float step = (float)(rate / (1.0 - pow(decay1, t))), root = (float)sqrt(1.0 - pow(decay2, t));
  for (long i = 0; i < n; i++) {
    const float g = gradient[i] * clip;
    mean[i] += 0.1f * (g - mean[i]);
    square[i] = 0.95f * square[i] + 0.05f * g * g;
    parameters[i] -= step * mean[i] / (sqrtf(square[i]) / root + 1e-8f);
  }
}
