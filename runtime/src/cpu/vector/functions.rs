//! Elementary functions without branches, so that loops over them become vector code.
//!
//! All polynomials were fitted to the functions in 40 digits at Chebyshev nodes and measured over their whole range in
//! single precision; the greatest error found is given in units of the last place (2^-23 of the result).

/// ln 2 in two parts: the first has few digits, so products with small integers are exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding it leaves the nearest integer in the low digits of a float.
const ROUND: f32 = 12_582_912.0;

/// `c[0] + c[1] x + …`.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut sum = c[N - 1];
    for i in (0..N - 1).rev() {
        sum = sum.mul_add(x, c[i]);
    }
    sum
}

/// 2 to an integer from -126 to 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// e to the power of `x`; 0.8 units where the result is normal.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Beyond these the result is infinite or zero; comparisons that are false keep NaN.
    let x = if x > 89.0 { 89.0 } else { x };
    let x = if x < -104.0 { -104.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let whole = shifted - ROUND;
    let r = (-whole).mul_add(LN_2_LOW, (-whole).mul_add(LN_2_HIGH, x));
    let p = polynomial(r, [0.5, 0.166_665_73, 0.041_666_456, 0.008_363_777, 0.001_393_454_5]);
    let y = (r * r).mul_add(p, r) + 1.0;
    // In two steps, as the power alone may be too large or too small for a float. NaN has no n.
    let n = if !(-152..=130).contains(&n) { 0 } else { n };
    let half = n >> 1;
    y * power_of_two(half) * power_of_two(n - half)
}

/// The hyperbolic tangent; 1.2 units.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let (a, z) = (x.abs(), x * x);
    let p = polynomial(z, [-0.333_333_28, 0.133_327_62, -0.053_849_403, 0.020_988_923, -0.006_083_525]);
    let small = (x * z).mul_add(p, x).copysign(x);
    let bounded = if a > 10.0 { 10.0 } else { a };
    let large = (1.0 - 2.0 / (exp(bounded + bounded) + 1.0)).copysign(x);
    if a < 0.625 { small } else { large }
}

/// 1 / (1 + e^-x); 2 units.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// The error function; 0.7 units.
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    let (a, z) = (x.abs(), x * x);
    let p = polynomial(
        z,
        [
            0.128_379_17,
            -0.376_126_38,
            0.112_837_83,
            -0.026_865_438,
            0.005_221_053_5,
            -0.000_848_439_64,
            0.000_112_682_54,
            -9.673_591e-6,
        ],
    );
    let small = x.mul_add(p, x);
    let bounded = if a > 4.0 { 4.0 } else { a };
    // -ln(1 - erf) from 1 to 4.
    let q = polynomial(
        bounded,
        [
            -0.000_303_212_96,
            1.130_166_6,
            0.631_937_1,
            0.109_978_24,
            -0.026_364_718,
            0.004_740_222_4,
            -0.000_592_769_53,
            4.559_062_3e-5,
            -1.614_061_6e-6,
        ],
    );
    let large = (1.0 - exp(-q)).copysign(x);
    if a <= 1.0 { small } else { large }
}

/// The natural logarithm; 0.7 units, subnormal arguments included.
#[inline(always)]
pub(crate) fn log(x: f32) -> f32 {
    let subnormal = x < f32::MIN_POSITIVE;
    let scaled = if subnormal { x * 8_388_608.0 } else { x };
    // A mantissa from the root of a half to the root of two.
    let bits = (scaled.to_bits() as i32).wrapping_sub(0x3f35_04f3);
    let n = bits >> 23;
    let f = f32::from_bits((bits & 0x007f_ffff).wrapping_add(0x3f35_04f3) as u32) - 1.0;
    let n = n as f32 - if subnormal { 23.0 } else { 0.0 };
    let z = f * f;
    let p = polynomial(
        f,
        [
            0.333_333_3,
            -0.249_999_88,
            0.200_007_2,
            -0.166_685_52,
            0.142_495_1,
            -0.124_089_9,
            0.116_639_4,
            -0.115_880_13,
            0.071_643_57,
        ],
    );
    let y = (f * z).mul_add(p, n * LN_2_LOW);
    let y = n.mul_add(LN_2_HIGH, f + z.mul_add(-0.5, y));
    let y = if x == f32::INFINITY { x } else { y };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x < 0.0 || x.is_nan() { f32::NAN } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The greatest error in units of the last place over `count` points from `low` to `high`.
    fn worst(f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64, low: f32, high: f32, count: usize) -> f64 {
        let mut worst: f64 = 0.0;
        for i in 0..=count {
            let x = low + (high - low) * (i as f32 / count as f32);
            let y = exact(f64::from(x));
            let unit = (y.abs() * f64::from(f32::EPSILON)).max(f64::from(f32::MIN_POSITIVE));
            worst = worst.max((f64::from(f(x)) - y).abs() / unit);
        }
        worst
    }

    #[test]
    fn errors_are_as_stated() {
        assert!(worst(exp, f64::exp, -87.0, 88.7, 2_000_000) < 0.85);
        assert!(worst(tanh, f64::tanh, -12.0, 12.0, 1_000_000) < 1.3);
        assert!(worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), -80.0, 20.0, 1_000_000) < 2.1);
        assert!(worst(log, f64::ln, 1e-6, 0.9, 1_000_000) < 0.8);
        assert!(worst(log, f64::ln, 1.1, 1e6, 1_000_000) < 0.8);
        // Reference values of the error function (Abramowitz and Stegun, table 7.1).
        let table = [(0.1, 0.112_462_916_0), (0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9)];
        let table = table.into_iter().chain([(1.5, 0.966_105_146_5), (2.0, 0.995_322_265_0)]);
        for (x, y) in table {
            assert!((f64::from(erf(x)) - y).abs() < 6e-8, "{x}");
            assert_eq!(erf(-x), -erf(x));
        }
    }

    #[test]
    fn ends_of_the_ranges_are_those_of_the_functions() {
        assert_eq!((exp(f32::INFINITY), exp(f32::NEG_INFINITY), exp(0.0)), (f32::INFINITY, 0.0, 1.0));
        assert_eq!((exp(100.0), exp(-200.0)), (f32::INFINITY, 0.0));
        assert!(exp(-100.0) > 0.0, "a subnormal result");
        assert_eq!((tanh(f32::INFINITY), tanh(-100.0), tanh(-0.0).to_bits()), (1.0, -1.0, (-0f32).to_bits()));
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
        assert_eq!((erf(f32::INFINITY), erf(-9.0)), (1.0, -1.0));
        assert_eq!((log(f32::INFINITY), log(0.0), log(1.0)), (f32::INFINITY, f32::NEG_INFINITY, 0.0));
        assert!((f64::from(log(1e-40)) - f64::from(1e-40f32).ln()).abs() < 1e-5);
        assert!(log(-1.0).is_nan());
        for f in [exp, tanh, sigmoid, erf, log] {
            assert!(f(f32::NAN).is_nan());
        }
    }
}
