//! Lines through measured points, by least squares of the relative error.
//!
//! A time is `base + bytes / bandwidth` only while caches serve it alike, so a collective gets up to six lines for
//! as many ranges of sizes. Ranks that were not measured get the ring's formula, fitted over all that were.

use super::links::Point;
use tpshard_passes::cost::profile::Collective;

/// Most lines for one collective.
const MOST_LINES: usize = 6;
/// Points that a line needs.
const LEAST_POINTS: usize = 2;
/// More lines are taken until every point is this close.
const CLOSE: f64 = 0.1;
/// What stands for nothing in a profile, whose numbers are above zero: seconds.
const NO_TIME: f64 = 1e-9;
/// And seconds per byte.
const NO_BYTE: f64 = 1e-15;

/// A line for sizes up to `up_to`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Line {
    pub(crate) up_to: f64,
    pub(crate) base: f64,
    pub(crate) seconds_per_byte: f64,
}

/// The weights `w >= 0` that minimise the squared relative error of `Σ w·feature` against the times.
pub(crate) fn least_squares<const N: usize>(rows: &[([f64; N], f64)]) -> [f64; N] {
    let mut best = ([0.0; N], f64::INFINITY);
    // With so few features, trying which of them to leave out is the simplest exact way to keep them from going
    // below zero.
    for used in 1u32..1 << N {
        let used: Vec<usize> = (0..N).filter(|i| used >> i & 1 == 1).collect();
        let Some(weights) = solve(rows, &used) else { continue };
        let error = |(features, time): &([f64; N], f64)| {
            let predicted: f64 = features.iter().zip(&weights).map(|(f, w)| f * w).sum();
            (predicted / time - 1.0).powi(2)
        };
        let error: f64 = rows.iter().map(error).sum();
        if weights.iter().all(|w| *w >= 0.0) && error < best.1 {
            best = (weights, error);
        }
    }
    best.0
}

/// The normal equations of the features in `used`, solved by elimination; `None` if they depend on each other.
fn solve<const N: usize>(rows: &[([f64; N], f64)], used: &[usize]) -> Option<[f64; N]> {
    let size = used.len();
    let mut matrix = vec![vec![0.0; size + 1]; size];
    for (features, time) in rows {
        let scaled: Vec<f64> = used.iter().map(|&i| features[i] / time).collect();
        for (row, a) in matrix.iter_mut().zip(&scaled) {
            row.iter_mut().zip(scaled.iter().chain([&1.0])).for_each(|(cell, b)| *cell += a * b);
        }
    }
    for pivot in 0..size {
        let at = (pivot..size).max_by(|&a, &b| matrix[a][pivot].abs().total_cmp(&matrix[b][pivot].abs()))?;
        matrix.swap(pivot, at);
        let head = matrix[pivot].clone();
        if head[pivot].abs() < 1e-30 {
            return None;
        }
        for (_, row) in matrix.iter_mut().enumerate().filter(|(index, _)| *index != pivot) {
            let factor = row[pivot] / head[pivot];
            row.iter_mut().zip(&head).for_each(|(cell, h)| *cell -= factor * h);
        }
    }
    let mut weights = [0.0; N];
    for (row, (&feature, equation)) in used.iter().zip(&matrix).enumerate() {
        weights[feature] = equation[size] / equation[row];
    }
    Some(weights)
}

/// The fewest lines, up to six, that come close to all points, which are sorted by bytes.
pub(crate) fn lines(points: &[(f64, f64)]) -> Vec<Line> {
    let most = (points.len() / LEAST_POINTS).clamp(1, MOST_LINES);
    let mut found = Vec::new();
    for count in 1..=most {
        found = best_cut(points, count).1;
        if points.iter().all(|&(bytes, time)| (at(&found, bytes) / time - 1.0).abs() <= CLOSE) {
            break;
        }
    }
    if let Some(last) = found.last_mut() {
        last.up_to = f64::INFINITY;
    }
    found
}

/// What the lines say for a size.
pub(crate) fn at(lines: &[Line], bytes: f64) -> f64 {
    let line = lines.iter().find(|l| bytes <= l.up_to).or(lines.last());
    line.map_or(f64::NAN, |l| l.base + bytes * l.seconds_per_byte)
}

/// The best way to cut the points into `count` runs: its squared error and its lines.
fn best_cut(points: &[(f64, f64)], count: usize) -> (f64, Vec<Line>) {
    if count <= 1 {
        let (error, line) = one_line(points);
        return (error, vec![line]);
    }
    let last = points.len().saturating_sub(LEAST_POINTS * (count - 1));
    let cuts = (LEAST_POINTS..=last).map(|cut| {
        let (head, rest) = points.split_at(cut);
        let (error, mut line) = one_line(head);
        // Halfway, on the scale on which sizes grow.
        if let (Some(before), Some(after)) = (head.last(), rest.first()) {
            line.up_to = (before.0 * after.0).sqrt();
        }
        let (more, lines) = best_cut(rest, count - 1);
        (error + more, [vec![line], lines].concat())
    });
    cuts.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, vec![]))
}

fn one_line(points: &[(f64, f64)]) -> (f64, Line) {
    let rows: Vec<([f64; 2], f64)> = points.iter().map(|&(bytes, time)| ([1.0, bytes], time)).collect();
    let [base, per_byte] = least_squares(&rows);
    let line =
        Line { up_to: f64::INFINITY, base: base.max(NO_TIME), seconds_per_byte: per_byte.max(NO_BYTE) };
    let error = |&(bytes, time): &(f64, f64)| (at(&[line], bytes) / time - 1.0).powi(2);
    (points.iter().map(error).sum(), line)
}

/// The ring's base, step and bandwidth, over all collectives and numbers of ranks.
pub(crate) fn ring<'a>(points: impl Iterator<Item = &'a Point>) -> [f64; 3] {
    let rows: Vec<([f64; 3], f64)> = points
        .map(|p| {
            let ranks = p.ranks as f64;
            let rounds = if p.collective == Collective::AllReduce { 2.0 } else { 1.0 };
            let carried = rounds * (ranks - 1.0) / ranks * p.bytes;
            ([1.0, rounds * (ranks - 1.0), carried], p.seconds)
        })
        .collect();
    let [base, step, per_byte] = least_squares(&rows);
    [base.max(NO_TIME), step.max(NO_TIME), 1.0 / per_byte.max(NO_BYTE)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes() -> impl Iterator<Item = f64> {
        (0..15).map(|i| f64::from(1024 << i))
    }

    #[test]
    fn a_straight_line_is_found_again() {
        let points: Vec<(f64, f64)> = sizes().map(|b| (b, 5e-6 + b / 4e9)).collect();
        let found = lines(&points);
        assert_eq!(found.len(), 1);
        assert!((found[0].base / 5e-6 - 1.0).abs() < 1e-6, "{found:?}");
        assert!((found[0].seconds_per_byte * 4e9 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn a_bend_gets_a_second_line() {
        let time = |b: f64| if b < 1e6 { 5e-6 + b / 10e9 } else { 20e-6 + b / 2e9 };
        let points: Vec<(f64, f64)> = sizes().map(|b| (b, time(b))).collect();
        let found = lines(&points);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(points.iter().all(|&(b, t)| (at(&found, b) / t - 1.0).abs() < 0.01), "{found:?}");
        assert_eq!(found[1].up_to, f64::INFINITY);
    }

    #[test]
    fn nothing_goes_below_zero() {
        // Convex: a line by plain least squares would start below zero.
        let points: Vec<(f64, f64)> = sizes().map(|b| (b, 1e-7 + (b / 1e9).powf(1.5))).collect();
        for line in lines(&points) {
            assert!(line.base > 0.0 && line.seconds_per_byte > 0.0, "{line:?}");
        }
        assert_eq!(lines(&[(1.0, 1.0)]).len(), 1);
    }

    #[test]
    fn a_ring_is_found_again() {
        let mut points = Vec::new();
        for (collective, rounds) in [(Collective::AllReduce, 2.0), (Collective::AllGather, 1.0)] {
            for ranks in [2, 4] {
                for bytes in sizes() {
                    let steps = rounds * (ranks as f64 - 1.0);
                    let seconds = 4e-6 + steps * 1e-6 + steps / ranks as f64 * bytes / 3e9;
                    let carrier = super::super::links::Carrier::Threads;
                    points.push(Point { carrier, collective, ranks, bytes, seconds });
                }
            }
        }
        let [base, step, bandwidth] = ring(points.iter());
        assert!((base / 4e-6 - 1.0).abs() < 1e-6, "{base}");
        assert!((step / 1e-6 - 1.0).abs() < 1e-6, "{step}");
        assert!((bandwidth / 3e9 - 1.0).abs() < 1e-6, "{bandwidth}");
    }
}
