// F(4, 3) over the points 0, +-a, +-b and infinity. With a b = 1 most factors are 1:
//
//   B' = | 1   0  -s   0   1   0 |      A' = | 1  1    1    1    1   0 |     G = | 1    0      0     |
//        | 0 -ab^2 -b^2 a  1   0 |           | 0  a   -a    b   -b   0 |         | p    p a    p a^2 |
//        | 0  ab^2 -b^2 -a 1   0 |           | 0  a^2  a^2  b^2  b^2 0 |         | p   -p a    p a^2 |
//        | 0 -ba^2 -a^2 b  1   0 |           | 0  a^3 -a^3  b^3 -b^3 1 |         | q    q b    q b^2 |
//        | 0  ba^2 -a^2 -b 1   0 |                                               | q   -q b    q b^2 |
//        | 0   1   0  -s   0   1 |                                               | 0    0      1     |
//
// s = a^2 + b^2, p = 1 / (2 a^2 (a^2 - b^2)), q = 1 / (2 b^2 (b^2 - a^2)).
#pragma once

namespace structadmm::kernels::points {

inline constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;
inline constexpr double kA2 = 0.5, kB2 = 2.0, kS = kA2 + kB2;
inline constexpr double kP = 1 / (2 * kA2 * (kA2 - kB2)), kQ = 1 / (2 * kB2 * (kB2 - kA2));

inline constexpr double kG[6][3] = {
    {1, 0, 0}, {kP, kP * kA, kP * kA2}, {kP, -kP * kA, kP * kA2}, {kQ, kQ * kB, kQ * kB2}, {kQ, -kQ * kB, kQ * kB2},
    {0, 0, 1}};

}  // namespace structadmm::kernels::points
