#include "onestep.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#ifndef STUDENT_BF16 /* 1: products in bfloat16, sums in float */
#define STUDENT_BF16 0
#endif
#ifndef STUDENT_AMX /* 1: products by Intel's tile instructions; with STUDENT_BF16, TOKENS a multiple of 32 */
#define STUDENT_AMX 0
#endif
#if STUDENT_BF16 && !defined(__AVX512BF16__)
#error "STUDENT_BF16 needs a processor with AVX-512 BF16, and a flag such as -march=native"
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if !defined(_WIN32) && !defined(__wasm__)
#include <sched.h>
#endif

/* ---- Vectors ---------------------------------------------------------------------------------------------------- */

/* Floats in a register, and the tile of sums that fits the registers: rows by vectors. */
#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 8, TILE_VECS = 2 };
#elif defined(__AVX__)
enum { LANES = 8, TILE_ROWS = 4, TILE_VECS = 2 };
#elif defined(__aarch64__)
enum { LANES = 4, TILE_ROWS = 8, TILE_VECS = 2 };
#else
enum { LANES = 4, TILE_ROWS = 4, TILE_VECS = 2 };
#endif
#if !defined(__AVX__)
#define SHORT_REGISTERS 1 /* LANES is 4 */
#else
#define SHORT_REGISTERS 0
#endif

/* Unaligned, and allowed to overlay arrays of numbers. */
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL(n) _Pragma("unroll")
#else
#define UNROLL(n) _Pragma("GCC unroll 8")
#endif

INLINE vec splat(float a) { return a - (vec){0}; }

#if defined(__AVX512F__)
INLINE float sum_lanes(vec a) { return _mm512_reduce_add_ps((__m512)a); }
INLINE vec vmax(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec vmin(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE float sum_lanes(vec a) {
  float sum = 0;
  for (int l = 0; l < LANES; l++) sum += a[l];
  return sum;
}
#if defined(__wasm_simd128__) /* one instruction each; a compiler finds it on other processors */
INLINE vec vmax(vec a, vec b) { return __builtin_wasm_pmax_f32x4(a, b); }
INLINE vec vmin(vec a, vec b) { return __builtin_wasm_pmin_f32x4(a, b); }
#else
INLINE vec choose(ivec which, vec a, vec b) { return (vec)(((ivec)a & which) | ((ivec)b & ~which)); }
INLINE vec vmax(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec vmin(vec a, vec b) { return choose(a < b, a, b); }
#endif
#endif

/* sum + a * b; compilers fuse it themselves where the processor can, but not for WebAssembly. */
#if defined(__wasm_relaxed_simd__)
INLINE vec multiply_add(vec sum, vec a, vec b) { return __builtin_wasm_relaxed_madd_f32x4(a, b, sum); }
#else
INLINE vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }
#endif

/* exp(x) after Cody and Waite: a power of two, and a polynomial for the rest. */
INLINE vec vexp(vec x) {
  const float round = 12582912.f; /* 1.5 * 2^23: adding it rounds to a whole number, in the lowest bits */
  x = vmin(vmax(x, splat(-87.f)), splat(88.f));
  vec n = multiply_add(splat(round), x, splat(1.44269504f));
  uvec power = (uvec)n << 23;
  n -= round;
  x = multiply_add(multiply_add(x, n, splat(-.693145752f)), n, splat(-1.42860677e-6f)); /* ln 2 in two parts */
#if STUDENT_BF16
  vec y = splat(4.16666667e-2f);
#else
  vec y = multiply_add(splat(8.33333333e-3f), x, splat(1.38888889e-3f));
  y = multiply_add(splat(4.16666667e-2f), y, x);
#endif
  y = multiply_add(splat(1.66666667e-1f), y, x);
  y = multiply_add(splat(.5f), y, x);
  y = multiply_add(splat(1.f), y, x);
  y = multiply_add(splat(1.f), y, x);
  return (vec)((uvec)y + power);
}

/* ---- Numbers that enter a product ------------------------------------------------------------------------------- */

/* A num enters a product. A unit is what a product reads at once: one float, or two bfloat16 that are multiplied with
 * two others and added together. */
#if STUDENT_BF16
typedef uint16_t num;
typedef uint32_t unit;
INLINE void store(num *to, float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  *to = (num)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE void store_vec(num *to, vec a) {
  __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)a);
  memcpy(to, &rounded, 32);
}
INLINE unit pair(num a, num b) { return a | (unit)b << 16; }
INLINE ivec splat_pair(const num *a) {
  int32_t bits;
  memcpy(&bits, a, 4);
  return bits - (ivec){0};
}
INLINE vec dot(vec sum, ivec a, ivec b) { return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
INLINE vec divide(vec a, vec b) { return a * (vec)_mm512_rcp14_ps((__m512)b); }

/* exp(x) for x <= 0 whose result is cut to bfloat16: a cubic for the part below a power of two. */
INLINE vec exp_bf16(vec x) {
  vec t = vmax(x * 1.44269504f, splat(-126.f));
  vec n = (vec)_mm512_roundscale_ps((__m512)t, 8);
  t -= n;
  vec y = 5.5171667e-2f * t + 2.4261112e-1f;
  y = y * t + 6.9326099e-1f;
  y = y * t + 9.9992807e-1f;
  return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
}

/* Two vectors of positive floats, cut to bfloat16 and interleaved. */
INLINE ivec cut_pairs(vec a, vec b) { return (((ivec)a >> 16) & 0xffff) | ((ivec)b & ~0xffff); }
#else
typedef float num;
typedef float unit;
INLINE void store(num *to, float a) { *to = a; }
INLINE void store_vec(num *to, vec a) { *(vec *)to = a; }
INLINE vec divide(vec a, vec b) { return a / b; }
#endif

/* ---- Stored weights --------------------------------------------------------------------------------------------- */

enum { IN_UNIT = sizeof(unit) / sizeof(num) };

/* Rows of a panel: whole units, and for tile instructions 32 rows at a time. */
#define TILED(rows) (STUDENT_AMX && (rows) >= 32)
#define PANEL_ROWS(rows) (TILED(rows) ? ROUND_UP(rows, 32) : ROUND_UP(rows, IN_UNIT))

enum {
  LONGEST = HIDDEN > WIDTH ? (HIDDEN > PATCH_PAD ? HIDDEN : PATCH_PAD) : (WIDTH > PATCH_PAD ? WIDTH : PATCH_PAD),
  PANEL_UNITS = ROUND_UP(LONGEST, 32) * 32 / IN_UNIT
};

#if STUDENT_FORMAT == (STUDENT_BF16 ? FORMAT_BF16_PAIRS : FORMAT_FP32)
#define STORED_AS_USED 1
#else
#define STORED_AS_USED 0
#endif

#if STUDENT_FORMAT == FORMAT_FP16 || STUDENT_FORMAT == FORMAT_INT8
/* Half precision to float. The shifted bits are the number times 2^-112, subnormal halves included; infinities and
 * not-a-numbers never occur. */
INLINE float from_half(uint16_t half) {
  uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
  float a;
  memcpy(&a, &bits, 4);
  a *= 0x1p112f;
  return half & 0x8000 ? -a : a;
}
#endif

/* n numbers of a table as floats: the table itself, or a copy in `room`. */
INLINE const float *table(const table_t *from, int n, float *room) {
#if STUDENT_FORMAT == FORMAT_FP16 || STUDENT_FORMAT == FORMAT_INT8
  for (int i = 0; i < n; i++) room[i] = from_half(from[i]);
  return room;
#else
  (void)n;
  (void)room;
  return from;
#endif
}

#if !STORED_AS_USED
INLINE float stored(const Linear *map, int rows, int column, int r, int c) {
  int at = column * rows + r * 32 + c;
#if STUDENT_FORMAT == FORMAT_INT8
  return (float)((const int8_t *)map->weights)[at] * map->scales[column + c];
#elif STUDENT_FORMAT == FORMAT_FP16
  return from_half(((const uint16_t *)map->weights)[at]);
#else
  return ((const float *)map->weights)[at];
#endif
}
#endif

/* The 32 columns from `column` on, as a product reads them. Weights that are stored shorter are expanded into `room`,
 * once for all tokens, which costs next to nothing. */
INLINE const unit *panel(const Linear *map, int rows, int column, unit *room) {
#if STORED_AS_USED
  (void)room;
  return (const unit *)map->weights + column * (PANEL_ROWS(rows) / IN_UNIT);
#elif STUDENT_BF16
  for (int r = 0; r < PANEL_ROWS(rows); r += 2)
    for (int c = 0; c < 32; c++) {
      num two[2] = {0, 0};
      for (int i = 0; i < 2 && r + i < rows; i++) store(two + i, stored(map, rows, column, r + i, c));
      room[r / 2 * 32 + c] = pair(two[0], two[1]);
    }
  return room;
#else
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < 32; c++) room[r * 32 + c] = stored(map, rows, column, r, c);
  return room;
#endif
}

/* ---- Linear maps ------------------------------------------------------------------------------------------------ */

/* TILE_ROWS tokens by one or two vectors of columns: the sums stay in registers. Rows of `w` are `step` apart. */
INLINE void tile_vectors(const num *a, int stride, const unit *w, int step, int rows, int vecs,
                         vec s[TILE_ROWS][TILE_VECS]) {
  for (int i = 0; i < TILE_ROWS; i++)
    for (int j = 0; j < TILE_VECS; j++) s[i][j] = (vec){0};
#if STUDENT_BF16
  for (int k = 0; k < ROUND_UP(rows, 2) / 2; k++) {
    ivec w0 = *(const ivec *)(w + step * k), w1 = vecs > 1 ? *(const ivec *)(w + step * k + LANES) : w0;
    UNROLL(8)
    for (int i = 0; i < TILE_ROWS; i++) {
      ivec b = splat_pair(a + i * stride + 2 * k);
      s[i][0] = dot(s[i][0], b, w0);
      if (vecs > 1) s[i][1] = dot(s[i][1], b, w1);
    }
  }
#else
  for (int k = 0; k < rows; k++) {
    vec w0 = *(const vec *)(w + step * k), w1 = vecs > 1 ? *(const vec *)(w + step * k + LANES) : w0;
    UNROLL(8)
    for (int i = 0; i < TILE_ROWS; i++) {
      vec b = splat(a[i * stride + k]);
      s[i][0] = multiply_add(s[i][0], b, w0);
      if (vecs > 1) s[i][1] = multiply_add(s[i][1], b, w1);
    }
  }
#endif
}

/* 32 tokens by 32 columns with Intel's tiles of 16 rows by 64 bytes: four of sums, two of tokens, two of weights. */
#if STUDENT_AMX
INLINE void tiles_configure(const int *rows, const int *bytes, int n) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < n; i++) {
    config.bytes[i] = (uint16_t)bytes[i];
    config.rows[i] = (uint8_t)rows[i];
  }
  _tile_loadconfig(&config);
}
INLINE void tiles_begin(void) {
  tiles_configure((int[]){16, 16, 16, 16, 16, 16, 16, 16}, (int[]){64, 64, 64, 64, 64, 64, 64, 64}, 8);
}
INLINE void tiles_end(void) { _tile_release(); }
INLINE void tile_amx(const num *a, int stride, const unit *w, int rows, vec s[32][2]) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < rows; k += 32) {
    _tile_loadd(4, a + k, 2 * stride);
    _tile_loadd(5, a + 16 * stride + k, 2 * stride);
    _tile_loadd(6, w + 16 * k, 128);
    _tile_loadd(7, w + 16 * k + 16, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, s[0], 128);
  _tile_stored(1, &s[0][1], 128);
  _tile_stored(2, s[16], 128);
  _tile_stored(3, &s[16][1], 128);
}
#else
INLINE void tiles_begin(void) {}
INLINE void tiles_end(void) {}
#endif

/* What follows a map is done while its result is still in registers. */
typedef enum { FLOATS, NUMS, GELU, ADD, ADD_GATED } Then;

INLINE void finish(vec y, Then then, void *out, int at, const float *gate) {
  vec *floats = (vec *)((float *)out + at);
  num *nums = (num *)out + at;
  switch (then) {
    case FLOATS: *floats = y; break;
    case NUMS: store_vec(nums, y); break;
    case GELU: store_vec(nums, divide(y, 1.f + vexp(-1.59576912f * (y + .044715f * y * y * y)))); break;
    case ADD: *floats += y; break;
    case ADD_GATED: *floats += y * *(const vec *)gate; break;
  }
}

typedef struct {
  int from, to; /* tokens of this thread */
} Range;

/* out = a @ weights + bias for the tokens of this thread, 32 columns at a time. */
INLINE void linear(const num *a, int stride, const Linear *map, int rows, int columns, Then then, void *out,
                   int out_stride, const float *gate, Range tokens, unit *room) {
  for (int n = 0; n < columns; n += 32) {
    const unit *w = panel(map, rows, n, room);
#if STUDENT_AMX
    if (TILED(rows)) {
      for (int m = tokens.from; m < tokens.to; m += 32) {
        vec s[32][2];
        tile_amx(a + m * stride, stride, w, PANEL_ROWS(rows), s);
        for (int i = 0; i < 32; i++)
          for (int j = 0; j < 2; j++) {
            int c = n + 16 * j;
            finish(s[i][j] + *(const vec *)(map->bias + c), then, out, (m + i) * out_stride + c, gate + c);
          }
      }
      continue;
    }
#endif
    for (int v = 0; v < 32; v += TILE_VECS * LANES)
      for (int m = tokens.from; m < tokens.to; m += TILE_ROWS) {
        vec s[TILE_ROWS][TILE_VECS];
        tile_vectors(a + m * stride, stride, w + v, 32, rows, TILE_VECS, s);
        for (int i = 0; i < TILE_ROWS; i++)
          for (int j = 0; j < TILE_VECS; j++) {
            int c = n + v + LANES * j;
            finish(s[i][j] + *(const vec *)(map->bias + c), then, out, (m + i) * out_stride + c, gate + c);
          }
      }
  }
}

/* ---- Norm and attention ----------------------------------------------------------------------------------------- */

/* Columns beyond the width are zero, so they may take part in the sums; what they add to the variance is taken off. */
INLINE void norm(const float *x, const float *shift, const float *scale, num *out, Range tokens) {
  const float width = (float)WIDTH, padding = (float)(WIDTH_PAD - WIDTH);
  for (int t = tokens.from; t < tokens.to && t < TOKENS; t++) {
    const float *from = x + t * WIDTH_PAD;
    vec total = {0}, squares = {0};
    for (int d = 0; d < WIDTH_PAD; d += LANES) total += *(const vec *)(from + d);
    float mean = sum_lanes(total) / width;
    for (int d = 0; d < WIDTH_PAD; d += LANES) {
      vec e = *(const vec *)(from + d) - mean;
      squares += e * e;
    }
    float variance = (sum_lanes(squares) - padding * mean * mean) / width;
    float inverse = 1 / sqrtf(variance + 1e-6f);
    for (int d = 0; d < WIDTH_PAD; d += LANES) {
      vec y = (*(const vec *)(from + d) - mean) * inverse;
      store_vec(out + t * WIDTH_PAD + d, y * *(const vec *)(scale + d) + *(const vec *)(shift + d));
    }
  }
}

#if SHORT_REGISTERS
/* Short registers: scores and sums are products of tiles, of TILE_ROWS queries by eight keys, then by the features of a
 * head. A number that is loaded for all lanes meets two registers, so loads do not bound it. Keys are transposed, and
 * scaled for powers of two; values lie together. `scores` has TILE_ROWS rows, and keys and values behind them. */
enum { KEYS = ROUND_UP(TOKENS, LANES * TILE_VECS) };

/* 2^x for x <= 0, to 2e-7: no power of e needs to be taken apart. */
INLINE vec exp2_below(vec x) {
  const float round = 12582912.f;
  x = vmax(x, splat(-126.f));
  vec n = x + round;
  uvec power = (uvec)n << 23;
  x -= n - round;
  vec y = multiply_add(splat(9.67554133e-3f), x, splat(1.32764718e-3f));
  y = multiply_add(splat(5.55071327e-2f), y, x);
  y = multiply_add(splat(2.40221197e-1f), y, x);
  y = multiply_add(splat(6.93146967e-1f), y, x);
  y = multiply_add(splat(1.00000007f), y, x);
  return (vec)((uvec)y + power);
}

/* Scores of TILE_ROWS queries with all keys, and the largest of each row. */
INLINE void score_tile(const num *q, const float *keys, int size, float *scores, float most[TILE_ROWS]) {
  vec s[TILE_ROWS][TILE_VECS], largest[TILE_ROWS];
  for (int i = 0; i < TILE_ROWS; i++) largest[i] = splat(-INFINITY);
  for (int j = 0; j < KEYS; j += LANES * TILE_VECS) {
    tile_vectors(q, QKV_PAD, keys + j, TOKENS_PAD, size, TILE_VECS, s);
    UNROLL(8)
    for (int i = 0; i < TILE_ROWS; i++) {
      vec *to = (vec *)(scores + i * TOKENS_PAD + j);
      to[0] = s[i][0];
      to[1] = s[i][1];
      if (KEYS > TOKENS) /* no such keys */
        for (int k = TOKENS - j; k < LANES * TILE_VECS; k++) ((float *)to)[k] = -INFINITY;
      largest[i] = vmax(largest[i], vmax(to[0], to[1]));
    }
  }
  for (int i = 0; i < TILE_ROWS; i++) {
    most[i] = -INFINITY;
    for (int l = 0; l < LANES; l++) most[i] = largest[i][l] > most[i] ? largest[i][l] : most[i];
  }
}

INLINE void attend_vectors(const num *qkv, num *out, vec *room, int size, Range tokens) {
  const int columns = ROUND_UP(size, LANES);
  float *scores = (float *)room, *keys = scores + TILE_ROWS * TOKENS_PAD, *values = keys + size * TOKENS_PAD;
  for (int h = 0; h < WIDTH / size; h++) {
    for (int j = 0; j < TOKENS; j++)
      for (int c = 0; c < size; c++) {
        const num *key = qkv + j * QKV_PAD + WIDTH + h * size + c;
        keys[c * TOKENS_PAD + j] = key[0] * 1.44269504f;
        values[j * columns + c] = key[WIDTH];
      }
    for (int t = tokens.from; t < tokens.to; t += TILE_ROWS) {
      float most[TILE_ROWS], inverse[TILE_ROWS];
      score_tile(qkv + t * QKV_PAD + h * size, keys, size, scores, most);
      for (int i = 0; i < TILE_ROWS; i++) {
        vec *row = (vec *)(scores + i * TOKENS_PAD), sum = {0};
        for (int j = 0; j < KEYS / LANES; j++) sum += row[j] = exp2_below(row[j] - most[i]);
        inverse[i] = 1 / sum_lanes(sum);
      }
      for (int c = 0; c < size; c += LANES * TILE_VECS) {
        vec s[TILE_ROWS][TILE_VECS];
        tile_vectors(scores, TOKENS_PAD, values + c, columns, TOKENS, columns - c > LANES ? 2 : 1, s);
        for (int i = 0; i < TILE_ROWS; i++)
          for (int k = 0; k < LANES * TILE_VECS && c + k < size; k++)
            out[(t + i) * WIDTH_PAD + h * size + c + k] = s[i][k / LANES][k % LANES] * inverse[i];
      }
    }
  }
}
#elif !STUDENT_BF16
/* Heads are small (8 to 16 features), so a register holds LANES queries, not features: a key or a value is one number
 * that meets all of them, every register is full, and nothing is transposed. `scores` has a vector for each key. */
INLINE vec gather(const num *from, int stride) {
  vec a = {0};
  for (int l = 0; l < LANES; l++) a[l] = from[l * stride];
  return a;
}
INLINE void attend_vectors(const num *qkv, num *out, vec *scores, int size, Range tokens) {
  for (int h = 0; h < WIDTH / size; h++)
    for (int t = tokens.from; t < tokens.to; t += LANES) {
      vec q[STUDENT_HEAD_MAX], o[STUDENT_HEAD_MAX], most = splat(-INFINITY), sum = {0};
      for (int c = 0; c < size; c++) {
        o[c] = (vec){0};
        q[c] = gather(qkv + t * QKV_PAD + h * size + c, QKV_PAD);
      }
      for (int j = 0; j < TOKENS; j++) {
        const num *key = qkv + j * QKV_PAD + WIDTH + h * size;
        vec a = {0};
        for (int c = 0; c < size; c++) a += q[c] * key[c];
        scores[j] = a;
        most = vmax(most, a);
      }
      for (int j = 0; j < TOKENS; j++) {
        const num *value = qkv + j * QKV_PAD + 2 * WIDTH + h * size;
        vec p = vexp(scores[j] - most);
        sum += p;
        for (int c = 0; c < size; c++) o[c] += p * value[c];
      }
      for (int c = 0; c < size; c++) {
        o[c] = divide(o[c], sum);
        for (int l = 0; l < LANES; l++) out[(t + l) * WIDTH_PAD + h * size + c] = o[c][l];
      }
    }
}
#else
/* In bfloat16 a query meets two features of a key at once, and the weights of two tokens their values, once these lie
 * in pairs. The weights are cut, not rounded: they are divided by the sum of what was cut. */
INLINE void attend_vectors(const num *qkv, num *out, vec *scores, int size, Range tokens) {
  unit *values = (unit *)(scores + TOKENS_PAD);
  const ivec ones = 0x3f803f80 - (ivec){0};
  for (int h = 0; h < WIDTH / size; h++) {
    for (int j = 0; j < TOKENS; j += 2)
      for (int c = 0; c < size; c++) {
        const num *value = qkv + j * QKV_PAD + 2 * WIDTH + h * size + c;
        values[j / 2 * size + c] = pair(value[0], j + 1 < TOKENS ? value[QKV_PAD] : (num)0);
      }
    for (int t = tokens.from; t < tokens.to; t += LANES) {
      ivec q[(STUDENT_HEAD_MAX + 1) / 2];
      vec o[STUDENT_HEAD_MAX], most = splat(-INFINITY), sum = {0};
      for (int c = 0; c < size; c++) o[c] = (vec){0};
      for (int c = 0; c < size; c += 2)
        for (int l = 0; l < LANES; l++) {
          const num *a = qkv + (t + l) * QKV_PAD + h * size + c;
          q[c / 2][l] = (int32_t)pair(a[0], c + 1 < size ? a[1] : (num)0);
        }
      for (int j = 0; j < TOKENS; j++) {
        const num *key = qkv + j * QKV_PAD + WIDTH + h * size;
        vec a = {0};
        for (int c = 0; c < size; c += 2) a = dot(a, q[c / 2], splat_pair(key + c));
        scores[j] = a;
        most = vmax(most, a);
      }
      if (TOKENS % 2) scores[TOKENS] = splat(-INFINITY);
      for (int j = 0; j < TOKENS; j += 2) {
        ivec p = cut_pairs(exp_bf16(scores[j] - most), exp_bf16(scores[j + 1] - most));
        sum = dot(sum, p, ones);
        for (int c = 0; c < size; c++) o[c] = dot(o[c], p, splat_pair((const num *)(values + j / 2 * size + c)));
      }
      for (int c = 0; c < size; c++) {
        o[c] = divide(o[c], sum);
        for (int l = 0; l < LANES; l++) store(out + (t + l) * WIDTH_PAD + h * size + c, o[c][l]);
      }
    }
  }
}
#endif

/* With tiles, the same picture is a product: sixteen keys by the pairs of sixteen queries gives scores with a query in
 * each lane; values by features, times the pairs of weights, gives the sums. For even heads of at most 16 features. */
#if STUDENT_AMX
INLINE void attend_amx(const num *qkv, num *out, vec *scores, int size, Range tokens) {
  num *values = (num *)(scores + TOKENS_PAD);
  ivec *weights = (ivec *)scores; /* take the place of the scores that they come from */
  tiles_configure((int[]){16, 16, size / 2, size, size, 16}, (int[]){64, 2 * size, 64, 64, 64, 64}, 6);
  for (int h = 0; h < WIDTH / size; h++) {
    for (int j = 0; j < TOKENS; j++)
      for (int c = 0; c < size; c++) values[c * TOKENS + j] = qkv[j * QKV_PAD + 2 * WIDTH + h * size + c];
    for (int t = tokens.from; t < tokens.to; t += 16) {
      ivec q[8];
      vec o[16], most = splat(-INFINITY), sum = {0};
      for (int c = 0; c < size; c += 2)
        for (int l = 0; l < 16; l++) memcpy((unit *)(q + c / 2) + l, qkv + (t + l) * QKV_PAD + h * size + c, 4);
      _tile_loadd(2, q, 64);
      _tile_zero(3);
      for (int j = 0; j < TOKENS; j += 16) {
        _tile_zero(0);
        _tile_loadd(1, qkv + j * QKV_PAD + WIDTH + h * size, 2 * QKV_PAD);
        _tile_dpbf16ps(0, 1, 2);
        _tile_stored(0, scores + j, 64);
        for (int i = j; i < j + 16; i++) most = vmax(most, scores[i]);
      }
      for (int j = 0; j < TOKENS; j += 2) {
        ivec p = cut_pairs(exp_bf16(scores[j] - most), exp_bf16(scores[j + 1] - most));
        sum = dot(sum, p, 0x3f803f80 - (ivec){0});
        weights[j / 2] = p;
      }
      for (int j = 0; j < TOKENS; j += 32) {
        _tile_loadd(4, values + j, 2 * TOKENS);
        _tile_loadd(5, weights + j / 2, 64);
        _tile_dpbf16ps(3, 4, 5);
      }
      _tile_stored(3, o, 64);
      sum = divide(splat(1.f), sum);
      for (int c = 0; c < size; c += 2) { /* two features at a time, rounded */
        uvec a = (uvec)(o[c] * sum) + 0x8000, b = (uvec)(o[c + 1] * sum) + 0x8000;
        uvec two = (a >> 16) | (b & 0xffff0000);
        for (int l = 0; l < 16; l++) memcpy(out + (t + l) * WIDTH_PAD + h * size + c, (unit *)&two + l, 4);
      }
    }
  }
  tiles_begin();
}
#endif

INLINE void attend(const num *qkv, num *out, vec *scores, int size, Range tokens) {
#if STUDENT_AMX
  if (size <= 16 && size % 2 == 0) {
    attend_amx(qkv, out, scores, size, tokens);
    return;
  }
#endif
  attend_vectors(qkv, out, scores, size, tokens);
}

/* ---- Scratch memory and threads --------------------------------------------------------------------------------- */

typedef struct {
  atomic_int arrived, generation;
} Barrier;

enum {
  IN_NUMBERS = HIDDEN_PAD > PATCH_PAD ? HIDDEN_PAD : PATCH_PAD,
  BARRIER_BYTES = 64,
  X_BYTES = 4 * TOKENS_PAD * WIDTH_PAD,
  LAST_BYTES = 4 * TOKENS_PAD * OUT_PAD,
  A_BYTES = (int)sizeof(num) * TOKENS_PAD * WIDTH_PAD,
  H_BYTES = (int)sizeof(num) * TOKENS_PAD * IN_NUMBERS,
  QKV_BYTES = (int)sizeof(num) * TOKENS_PAD * QKV_PAD,
#if SHORT_REGISTERS
  SCORES_BYTES = 4 * TILE_ROWS * TOKENS_PAD,
  VALUES_BYTES = 4 * TOKENS_PAD * (STUDENT_HEAD_MAX + ROUND_UP(STUDENT_HEAD_MAX, LANES)),
#else
  SCORES_BYTES = 4 * LANES * TOKENS_PAD,
  VALUES_BYTES = STUDENT_BF16 * 2 * TOKENS_PAD * ROUND_UP(STUDENT_HEAD_MAX, 2),
#endif
  TABLE_BYTES = sizeof(table_t) < 4 ? 4 * 6 * WIDTH_PAD : 0,
  PANEL_BYTES = STORED_AS_USED ? 0 : 4 * PANEL_UNITS,
  SHARED_BYTES = BARRIER_BYTES + X_BYTES + LAST_BYTES + A_BYTES + H_BYTES + QKV_BYTES,
  OWN_BYTES = SCORES_BYTES + VALUES_BYTES + TABLE_BYTES + PANEL_BYTES
};

/* Several threads keep keys and values of two layers: a thread may be one layer ahead of another. */
size_t onestep_scratch(int threads) {
  return (size_t)SHARED_BYTES + (size_t)threads * OWN_BYTES + (threads > 1 ? QKV_BYTES : 0);
}

/* A waiting thread spins for a while and then gives its core away. */
static void pause_after(int spins) {
#if !defined(_WIN32) && !defined(__wasm__)
  if (spins >= 2000) sched_yield();
#else
  (void)spins;
#endif
}

/* No thread goes on before all have come. */
static void wait_for_all(Barrier *barrier, int threads) {
  int generation = atomic_load(&barrier->generation);
  if (atomic_fetch_add(&barrier->arrived, 1) == threads - 1) {
    atomic_store(&barrier->arrived, 0);
    atomic_store(&barrier->generation, generation + 1);
    return;
  }
  for (int spins = 0; atomic_load(&barrier->generation) == generation; spins++) pause_after(spins);
}

/* Tokens of a thread: whole tiles. */
static int first_token(int rank, int threads) {
  const int tile = STUDENT_AMX ? 32 : 16;
  return TOKENS_PAD / tile * rank / threads * tile;
}

/* ---- The network ------------------------------------------------------------------------------------------------ */

/* Where in an image the number (channel, i, j) of a token's patch lies. */
INLINE int pixel(int token, int channel, int i, int j) {
  int row = token / GRID * STUDENT_PATCH + i, column = token % GRID * STUDENT_PATCH + j;
  return (channel * STUDENT_IMAGE_SIZE + row) * STUDENT_IMAGE_SIZE + column;
}

INLINE void cut_patches(const float *noise, num *out, Range tokens) {
  for (int t = tokens.from; t < tokens.to; t++) {
    num *to = out + t * PATCH_PAD;
    memset(to, 0, sizeof(num) * PATCH_PAD);
    if (t >= TOKENS) continue;
    for (int c = 0; c < STUDENT_CHANNELS; c++)
      for (int i = 0; i < STUDENT_PATCH; i++)
        for (int j = 0; j < STUDENT_PATCH; j++) store(to++, noise[pixel(t, c, i, j)]);
  }
}

INLINE void join_patches(const float *last, float *image, Range tokens) {
  for (int t = tokens.from; t < tokens.to && t < TOKENS; t++)
    for (int i = 0; i < STUDENT_PATCH; i++)
      for (int j = 0; j < STUDENT_PATCH; j++)
        for (int c = 0; c < STUDENT_CHANNELS; c++)
          image[pixel(t, c, i, j)] = last[t * OUT_PAD + (i * STUDENT_PATCH + j) * STUDENT_CHANNELS + c];
}

void onestep_draw(const Net *net, const float *noise, int label, float *image, void *scratch, int rank, int threads) {
  static const int head_size[] = STUDENT_HEAD_SIZES;
  const Range tokens = {first_token(rank, threads), first_token(rank + 1, threads)};
  char *at = scratch;
  Barrier *barrier = (Barrier *)(void *)at;
  float *x = (float *)(void *)(at += BARRIER_BYTES);
  float *last = (float *)(void *)(at += X_BYTES);
  num *a = (num *)(void *)(at += LAST_BYTES);
  num *h = (num *)(void *)(at += A_BYTES);
  num *qkv_of_layers = (num *)(void *)(at += H_BYTES);
  at += threads > 1 ? 2 * QKV_BYTES : QKV_BYTES;
  vec *scores = (vec *)(void *)(at += (ptrdiff_t)rank * OWN_BYTES);
  float *table_room = (float *)(void *)(at += SCORES_BYTES + VALUES_BYTES);
  unit *panel_room = (unit *)(void *)(at + TABLE_BYTES);

  tiles_begin();
  cut_patches(noise, h, tokens);
  for (int t = tokens.from; t < tokens.to; t++) {
    float *to = x + t * WIDTH_PAD;
    const float *from = table(net->tokens + t * WIDTH_PAD, WIDTH_PAD, to);
    if (from != to) memcpy(to, from, 4 * WIDTH_PAD);
    if (t >= TOKENS) memset(a + t * WIDTH_PAD, 0, sizeof(num) * WIDTH_PAD); /* padding stays finite */
  }
  linear(h, PATCH_PAD, &net->patch, PATCH_PAD, WIDTH_PAD, ADD, x, WIDTH_PAD, x, tokens, panel_room);
  for (int l = 0; l < STUDENT_DEPTH; l++) {
    const Layer *w = net->layers + l;
    const float *m = table(w->modulation + label * 6 * WIDTH_PAD, 6 * WIDTH_PAD, table_room);
    num *qkv = qkv_of_layers + (threads > 1 && l % 2 ? TOKENS_PAD * QKV_PAD : 0);
    norm(x, m, m + WIDTH_PAD, a, tokens);
    linear(a, WIDTH_PAD, &w->qkv, WIDTH, QKV_PAD, NUMS, qkv, QKV_PAD, x, tokens, panel_room);
    if (threads > 1) wait_for_all(barrier, threads);
#define ATTEND(size) \
  case size: attend(qkv, a, scores, size, tokens); break;
    switch (head_size[l]) { STUDENT_HEAD_CASES(ATTEND) }
    linear(a, WIDTH_PAD, &w->proj, WIDTH, WIDTH_PAD, ADD_GATED, x, WIDTH_PAD, m + 2 * WIDTH_PAD, tokens, panel_room);
    norm(x, m + 3 * WIDTH_PAD, m + 4 * WIDTH_PAD, a, tokens);
    linear(a, WIDTH_PAD, &w->fc1, WIDTH, HIDDEN_PAD, GELU, h, HIDDEN_PAD, x, tokens, panel_room);
    linear(h, HIDDEN_PAD, &w->fc2, HIDDEN, WIDTH_PAD, ADD_GATED, x, WIDTH_PAD, m + 5 * WIDTH_PAD, tokens, panel_room);
  }
  const float *m = table(net->modulation + label * 2 * WIDTH_PAD, 2 * WIDTH_PAD, table_room);
  norm(x, m, m + WIDTH_PAD, a, tokens);
  linear(a, WIDTH_PAD, &net->last, WIDTH, OUT_PAD, FLOATS, last, OUT_PAD, x, tokens, panel_room);
  tiles_end();
  join_patches(last, image, tokens);
  if (threads > 1) wait_for_all(barrier, threads); /* the next image would write where a slower thread still reads */
}
