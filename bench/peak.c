// What one thread can do at most: fused multiply-adds on registers alone, and bf16 tile products on tiles alone.
// Each function returns floating-point operations per second, 0 where the CPU lacks the instructions.
// Built by peak.py: cc -O2 -shared -fPIC.
#define _GNU_SOURCE
#include <immintrin.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

// Twelve independent chains cover a latency of 4 cycles on two ports with room to spare.
#define CHAINS(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)

__attribute__((target("avx512f"))) static double fma512(long n) {
#define START(i) __m512 a##i = _mm512_set1_ps(i);
#define STEP(i) __asm__ volatile("vfmadd231ps %1, %2, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define SUM(i) s = _mm512_add_ps(s, a##i);
  CHAINS(START)
  __m512 x = _mm512_set1_ps(1e-9f), y = _mm512_set1_ps(0.5f), s = _mm512_setzero_ps();
  double start = now();
  for (long i = 0; i < n; i++) { CHAINS(STEP) }
  double seconds = now() - start;
  CHAINS(SUM)
  volatile float sink = _mm512_reduce_add_ps(s);
  (void)sink;
  return n * 12.0 * 32 / seconds;
#undef START
#undef SUM
}

__attribute__((target("avx2,fma"))) static double fma256(long n) {
#define START(i) __m256 a##i = _mm256_set1_ps(i);
#define SUM(i) s = _mm256_add_ps(s, a##i);
  CHAINS(START)
  __m256 x = _mm256_set1_ps(1e-9f), y = _mm256_set1_ps(0.5f), s = _mm256_setzero_ps();
  double start = now();
  for (long i = 0; i < n; i++) { CHAINS(STEP) }
  double seconds = now() - start;
  CHAINS(SUM)
  volatile float sink = _mm256_cvtss_f32(s);
  (void)sink;
  return n * 12.0 * 16 / seconds;
#undef START
#undef SUM
}

__attribute__((target("avx512f,avx512bf16"))) static double dot512(long n) {
#define START(i) __m512 a##i = _mm512_set1_ps(i);
#define DOT(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(a##i) : "v"(x), "v"(y));
#define SUM(i) s = _mm512_add_ps(s, a##i);
  CHAINS(START)
  __m512 x = _mm512_set1_ps(1e-9f), y = _mm512_set1_ps(0.5f), s = _mm512_setzero_ps();
  double start = now();
  for (long i = 0; i < n; i++) { CHAINS(DOT) }
  double seconds = now() - start;
  CHAINS(SUM)
  volatile float sink = _mm512_reduce_add_ps(s);
  (void)sink;
  return n * 12.0 * 64 / seconds;
}

__attribute__((target("amx-tile,amx-bf16"))) static double tiles(long n) {
  if (syscall(SYS_arch_prctl, 0x1023, 18)) return 0;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  double start = now();
  for (long i = 0; i < n; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
  double seconds = now() - start;
  _tile_release();
  return n * 4.0 * 2 * 16 * 16 * 32 / seconds;
}

static double fastest(double (*run)(long), long n) {
  double best = 0;
  for (int i = 0; i < 7; i++) {
    double now = run(n);
    best = now > best ? now : best;
  }
  return best;
}

double peak_f32(void) {
  if (__builtin_cpu_supports("avx512f")) return fastest(fma512, 4000000);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fastest(fma256, 4000000);
  return 0;
}

double peak_bf16_vector(void) { return __builtin_cpu_supports("avx512bf16") ? fastest(dot512, 4000000) : 0; }

double peak_bf16_tile(void) {
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return d >> 22 & d >> 24 & 1 ? fastest(tiles, 2000000) : 0;
}
