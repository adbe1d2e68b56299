//! N ranks in one process, for tests and for programs that want no processes.

use super::collectives::Collectives;
use super::shared::{Endpoint, Region};
use super::{CommError, CommOptions, Communicator};
use std::sync::Arc;

/// The ends of `world_size` ranks, to be handed to as many threads.
///
/// # Errors
/// [`CommError::Usage`] for a bad rank count or slot size, [`CommError::System`] without memory.
pub fn threads(world_size: usize, options: &CommOptions) -> Result<Vec<Box<dyn Communicator>>, CommError> {
    let region = Arc::new(Region::in_process(world_size, options.slot_bytes)?);
    let end = |rank| -> Box<dyn Communicator> {
        Box::new(Collectives::new(Endpoint::new(region.clone(), rank, options)))
    };
    Ok((0..world_size).map(end).collect())
}
