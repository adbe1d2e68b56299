//! Rows from several places put one after another, in memory that nobody has written before.
#![allow(unsafe_code, reason = "filling memory with zeros first would be a second pass over it")]

use crate::team;

/// Elements of a task, about.
const CHUNK: usize = 1 << 14;

/// What a row is made of.
pub(crate) enum Row<'a, T> {
    /// These elements; they have to be as many as rows have.
    Of(&'a [T]),
    /// One element again and again.
    All(T),
}

/// `count` rows of `width` elements, on all threads of the team, in the memory of `spare`.
///
/// # Panics
/// If elements of a row are given that are not `width` many.
pub(crate) fn collected<'a, T: Copy + Send + Sync + 'a>(
    spare: Vec<T>,
    [count, width]: [usize; 2],
    row: impl Fn(usize) -> Row<'a, T> + Sync,
) -> Vec<T> {
    let mut out = spare;
    out.clear();
    if width == 0 || count == 0 {
        return out;
    }
    let length = count * width;
    out.reserve_exact(length);
    let per_task = (CHUNK / width).max(1);
    let places = &mut out.spare_capacity_mut()[..length];
    team::for_each(places.chunks_mut(per_task * width).enumerate(), |(task, chunk)| {
        for (i, to) in chunk.chunks_mut(width).enumerate() {
            match row(task * per_task + i) {
                Row::Of(from) => {
                    assert_eq!(from.len(), to.len(), "a row of another width");
                    // SAFETY: both have as many elements of `T`, which is `Copy`, and the one that is written is borrowed
                    // mutably.
                    unsafe {
                        std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr().cast::<T>(), from.len())
                    };
                }
                Row::All(value) => to.iter_mut().for_each(|place| {
                    place.write(value);
                }),
            }
        }
    });
    // SAFETY: the chunks of the first `length` places were all written: `length` is a multiple of `width`, and a panic
    // would not come here.
    unsafe { out.set_len(length) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_in_order_whatever_was_there_before() {
        let table: Vec<f32> = (0..12).map(|i| i as f32).collect();
        for spare in [vec![], vec![7.0; 3], vec![7.0; 100]] {
            let row = |i: usize| if i == 1 { Row::All(-1.0) } else { Row::Of(&table[i * 3..][..3]) };
            let rows = collected(spare, [3, 3], row);
            assert_eq!(rows, [0.0, 1.0, 2.0, -1.0, -1.0, -1.0, 6.0, 7.0, 8.0]);
        }
        assert!(collected(vec![1.0], [3, 0], |_| Row::All(0.0)).is_empty());
        assert!(collected(vec![1.0], [0, 3], |_| Row::All(0.0)).is_empty());
    }

    #[test]
    #[should_panic(expected = "another width")]
    fn a_row_of_another_width_is_refused() {
        collected(vec![], [1, 2], |_| Row::Of(&[1.0]));
    }

    #[test]
    fn many_rows_are_shared_out() {
        let wide: Vec<u32> = (0..1 << 15).collect();
        let rows = collected(vec![], [64, 1 << 9], |i| Row::Of(&wide[i << 9..][..1 << 9]));
        assert_eq!(rows, wide);
    }
}
