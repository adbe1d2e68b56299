//! All ranks learn whether all ranks succeeded.

use super::SessionError;
use crate::comm::{Communicator, Group, Monoid, Tag};
use tpshard_ir::Tensor;

/// Succeeds if every rank brings success; otherwise every rank gets the errors of the ranks that failed, its own as it
/// is. One small all-reduce in the good case.
pub(super) fn agree<T>(
    communicator: &dyn Communicator,
    sequence: &mut u64,
    own: Result<T, SessionError>,
) -> Result<T, SessionError> {
    if communicator.world_size() == 1 {
        return own;
    }
    let group = Group::world(communicator.world_size());
    let mut next = || {
        *sequence += 1;
        Tag { sequence: *sequence, node: u32::MAX }
    };
    let mut failed = Tensor::scalar(i32::from(own.is_err()));
    communicator.all_reduce(&group, next(), Monoid::Max, &mut failed)?;
    if failed.as_slice::<i32>().is_ok_and(|f| f == [0]) {
        return own;
    }
    let message = own.as_ref().err().map(ToString::to_string).unwrap_or_default();
    let messages = communicator.gather_bytes(&group, next(), 0, message.as_bytes())?;
    let first = messages.and_then(|all| {
        let at = all.iter().position(|m| !m.is_empty())?;
        Some(format!("{at}\n{}", String::from_utf8_lossy(&all[at])))
    });
    let told = communicator.broadcast_bytes(&group, next(), 0, first.unwrap_or_default().as_bytes())?;
    let told = String::from_utf8_lossy(&told).into_owned();
    let (rank, message) = told.split_once('\n').unwrap_or(("0", "failed without a message"));
    match own {
        Err(error) => Err(error),
        Ok(_) => Err(SessionError::Refused { rank: rank.parse().unwrap_or(0), message: message.into() }),
    }
}
