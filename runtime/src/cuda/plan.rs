//! Where values lie in a run's memory, for concrete dims: one piece of memory, in which values whose lives do not overlap
//! take the same place.
//!
//! The steps are gone through in order; each takes the lowest gap that is large enough. Equal dims give equal plans.

use super::beside::Beside;
use super::prepared::Prepared;
use tpshard_ir::dim::{Bindings, Dim, EvalError};
use tpshard_ir::program::PlanError;
use tpshard_ir::{DType, ValueId};

/// Places begin at multiples of this, as the widest loads of kernels and of libraries demand.
const ALIGNMENT: u64 = 256;

/// What is not larger grows in larger steps, an eighth of its size: while a dim grows by one in every run, most runs then
/// find everything where it was, which graphs live on.
const SMALL: u64 = 1 << 20;

/// The bytes that are set aside for as many.
fn set_aside(bytes: u64) -> Option<u64> {
    let step = if bytes <= SMALL { bytes.next_power_of_two() / 8 } else { 0 };
    bytes.checked_next_multiple_of(step.max(ALIGNMENT))
}

/// The places of an entry's values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Of every step that begins memory whose size is known: where it lies. Sizes that data decides are known later.
    pub(super) places: Vec<Option<u64>>,
    /// Of every step: its scratch memory.
    pub(super) scratch: Vec<Option<u64>>,
    pub(crate) bytes: u64,
    /// Bytes of values on their way between devices.
    pub(crate) staging: u64,
    /// What travels while the device computes.
    pub(super) beside: Beside,
    /// The dims, and how much room state has.
    pub(super) bindings: Bindings,
}

/// What lies between two places.
struct Taken {
    from: u64,
    to: u64,
    /// The last step that needs it.
    last: usize,
}

/// The bytes of `elements`, rounded up to whole places; nothing if data decides them.
pub(super) fn size(
    value: ValueId,
    dtype: DType,
    elements: &Dim,
    bindings: &Bindings,
) -> Result<Option<u64>, PlanError> {
    let elements = match elements.eval(bindings) {
        Ok(elements) => elements,
        Err(EvalError::Unbound(_)) => return Ok(None),
        Err(error) => return Err(PlanError::Dim { value, error }),
    };
    u64::try_from(elements)
        .ok()
        .and_then(|n| dtype.byte_len(n))
        .and_then(set_aside)
        .filter(|&bytes| bytes <= isize::MAX as u64)
        .map(Some)
        .ok_or(PlanError::Size { value, elements, dtype })
}

impl Plan {
    /// `given` says which steps have memory from elsewhere. With `keep`, nothing takes the place of anything else.
    pub(super) fn new(
        prepared: &Prepared,
        (bindings, beside): (Bindings, Beside),
        given: &dyn Fn(ValueId) -> bool,
        keep: bool,
    ) -> Result<Plan, PlanError> {
        let mut plan = Plan { bindings, beside, ..Plan::default() };
        let mut taken: Vec<Taken> = Vec::new();
        for (index, (step, room)) in prepared.steps.iter().zip(&prepared.rooms).enumerate() {
            if !keep {
                taken.retain(|t| t.last >= index);
            }
            let value = step.value;
            let own = match room {
                Some(room) if !given(value) => size(value, room.dtype, &room.elements, &plan.bindings)?,
                _ => None,
            };
            let last = room.as_ref().map_or(index, |room| plan.beside.last(index, room.last));
            let place = own.map(|bytes| take(&mut taken, bytes, last)).transpose()?;
            plan.places.push(place);
            let scratch = size(value, DType::U8, &step.scratch, &plan.bindings)?;
            let scratch = scratch.filter(|&bytes| bytes > 0);
            let scratch = scratch.map(|bytes| take(&mut taken, bytes, index)).transpose()?;
            plan.scratch.push(scratch);
            plan.bytes = plan.bytes.max(taken.iter().map(|t| t.to).max().unwrap_or(0));
        }
        Ok(plan)
    }
}

/// The lowest gap of this size, which is taken.
fn take(taken: &mut Vec<Taken>, bytes: u64, last: usize) -> Result<u64, PlanError> {
    let mut from = 0u64;
    let mut at = 0;
    // What is taken is in order, and does not overlap.
    for (index, other) in taken.iter().enumerate() {
        if other.from.saturating_sub(from) >= bytes && other.from >= from {
            break;
        }
        from = other.to;
        at = index + 1;
    }
    let to = from.checked_add(bytes).filter(|&to| to <= isize::MAX as u64).ok_or(PlanError::Total)?;
    taken.insert(at, Taken { from, to, last });
    Ok(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_grow_rarely() {
        let mut sizes: Vec<u64> = (0..=4096u64).filter_map(|n| set_aside(8 * n)).collect();
        assert!(sizes.iter().zip(0u64..).all(|(&size, n)| size >= 8 * n && size <= 8 * n + 4 * n / 2 + 256));
        sizes.dedup();
        assert!(sizes.len() < 50, "{sizes:?}");
        assert_eq!(set_aside(SMALL + 1), Some(SMALL + ALIGNMENT));
        assert_eq!(set_aside(u64::MAX), None);
    }

    #[test]
    fn gaps_are_filled_lowest_first_and_nothing_overlaps() {
        let mut taken = Vec::new();
        let mut places = Vec::new();
        // (bytes, first step, last step)
        let lives = [(512, 0, 1), (256, 0, 9), (256, 1, 2), (256, 2, 3), (512, 3, 5), (256, 3, 9), (0, 4, 4)];
        for (bytes, first, last) in lives {
            taken.retain(|t: &Taken| t.last >= first);
            places.push(take(&mut taken, bytes, last).unwrap());
        }
        for (i, (bytes, first, last)) in lives.iter().enumerate() {
            for (j, (other, begin, end)) in lives.iter().enumerate().skip(i + 1) {
                let together = first.max(begin) <= last.min(end);
                let apart = places[i] + bytes <= places[j] || places[j] + other <= places[i];
                assert!(!together || apart, "{i} and {j} of {places:?}");
            }
        }
        // The last one takes the place of the first, which is over.
        assert_eq!(places[3], 0);
        assert!(take(&mut taken, u64::MAX, 9).is_err());
    }
}
