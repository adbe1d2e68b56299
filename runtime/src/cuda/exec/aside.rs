//! Products that are summed over ranks piece by piece, and how the two queues of the device wait for each other.

use super::{Failed, Run, local};
use crate::comm::{CommError, Communicator};
use crate::cpu::convert::StepError;
use tpshard_driver::DriverError;
use tpshard_ir::ValueId;
use tpshard_ir::program::device::How;
use tpshard_ir::program::device::pieces::{PIECE_ROWS, PIECE_START};

impl<'a> Run<'a> {
    /// Has the main queue wait for the collectives in the side one, if there are any.
    ///
    /// # Errors
    /// The run is over.
    pub(super) fn join(&mut self, communicator: &dyn Communicator) -> Result<(), CommError> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        // What was called before does not wait.
        self.flush(communicator)?;
        if let Some(links) = self.links
            && let Err(error) = links.join_side()
        {
            let end = |what: String| links.give_up(communicator, what);
            return Err(end(format!("the collectives cannot be waited for: {error}")));
        }
        Ok(())
    }

    /// The rows of the pieces in which a step sums what the step before has left to it to compute.
    pub(super) fn pieces_of(&self, step: usize) -> Option<&'a [u64]> {
        self.plan.beside.pieces(step).filter(|_| self.overlap)
    }

    /// Computes the pieces of what step `index` sums, each marked as ready; bytes of each. Where nothing overlaps, the whole
    /// is there already, and is only summed in the same pieces, since the other ranks do that too.
    pub(super) fn in_pieces(
        &mut self,
        index: usize,
        from: ValueId,
        communicator: &dyn Communicator,
    ) -> Result<Vec<u64>, StepError> {
        let (plan, prepared) = (self.plan, self.prepared);
        let (Some(rows), Some(cut)) = (plan.beside.pieces(index), prepared.cuts.get(&index)) else {
            return Ok(Vec::new());
        };
        let row = cut.pieces.row.eval(&self.bindings).map_err(local)?;
        let dtype = self.graph().ty(from).dtype;
        let bytes = |rows: u64| {
            let elements = u64::try_from(row).ok().and_then(|row| row.checked_mul(rows));
            elements.and_then(|n| dtype.byte_len(n)).ok_or_else(|| "pieces beyond memory".to_owned())
        };
        let pieces = rows.iter().map(|&rows| bytes(rows)).collect::<Result<Vec<u64>, String>>()?;
        if self.overlap {
            let mut start = 0;
            let mut is_broken = false;
            for (number, &rows) in rows.iter().enumerate() {
                if !is_broken && let Err(error) = self.piece(index, [start, rows], communicator) {
                    is_broken = true;
                    // As for the whole: zeros are summed in its place.
                    self.failed(index.saturating_sub(1), from, error, communicator)?;
                }
                self.mark_ready(number, communicator)?;
                start += rows;
            }
        }
        Ok(pieces)
    }

    fn mark_ready(&mut self, piece: usize, communicator: &dyn Communicator) -> Result<(), CommError> {
        let Some(links) = self.links else { return Ok(()) };
        links.ready(piece).map_err(|error: DriverError| {
            let failed = Failed::Step(error.to_string());
            links.give_up(communicator, failed.to_string())
        })
    }

    /// Puts the calls of a piece into the main queue: so many rows, from a first one on.
    fn piece(
        &mut self,
        index: usize,
        [start, rows]: [u64; 2],
        communicator: &dyn Communicator,
    ) -> Result<(), StepError> {
        let Some(cut) = self.prepared.cuts.get(&index) else { return Err("no pieces".into()) };
        let number = |n: u64| i64::try_from(n).map_err(local);
        let mut bindings = self.bindings.clone();
        bindings.insert(PIECE_START.into(), number(start)?);
        bindings.insert(PIECE_ROWS.into(), number(rows)?);
        if let How::Product(product) = &cut.pieces.how
            && self.multiplied(product, Some(&bindings), communicator)?
        {
            return Ok(());
        }
        let product = index.saturating_sub(1);
        let sizes = cut.calls.sizes(&bindings);
        for call in cut.calls.of(0) {
            if let Some(call) = self.call(call, (&cut.calls, &sizes), None)? {
                self.wait_with(product, call);
            }
        }
        Ok(self.flush(communicator)?)
    }
}
