//! How much memory a conversion takes for values on their way, besides what it reads and writes.

use super::convert::{Cut, are_equal, starts};
use crate::comm::Group;
use crate::cpu::convert::{Place, extents, held};
use tpshard_ir::Conversion;
use tpshard_ir::program::Family;

/// Bytes on their way in a conversion that NCCL carries, on this rank; `dtype` and layouts are those of the families.
///
/// # Errors
/// Sizes that nobody knows yet, or that are larger than memory.
pub(in crate::cuda) fn staged(
    conversion: &Conversion,
    [from, to]: [&Family; 2],
    place: &Place<'_>,
) -> Result<u64, String> {
    let group = Group::new(place.mesh.group(place.rank, conversion.axes())).map_err(|e| e.to_string())?;
    let alone = group.len() < 2;
    let dtype = from.ty.dtype;
    let own = |family: &Family| -> Result<Vec<usize>, String> {
        Ok(held(family, place, place.rank)?.into_iter().map(|(_, length)| length).collect())
    };
    let bytes = |shape: &[usize]| -> Result<u64, String> {
        let elements = shape.iter().try_fold(1u64, |n, &extent| n.checked_mul(extent as u64));
        elements
            .and_then(|n| dtype.byte_len(n))
            .ok_or_else(|| format!("{dtype}{shape:?} is larger than memory"))
    };
    let parts = |family: &Family, dim: usize| extents(family, place, &group, dim);
    match conversion {
        Conversion::AllGather { dim, .. } => {
            let shape = own(to)?;
            Ok(gathering(&Cut::of(dtype, &shape, *dim)?, bytes(&shape)?, alone))
        }
        Conversion::ReduceScatter { dim, .. } if !alone => {
            let (cut, parts) = (Cut::of(dtype, &own(from)?, *dim)?, parts(to, *dim)?);
            Ok(scattering(&cut, &parts)?.map_or(0, |blocks| blocks.bytes()))
        }
        Conversion::AllToAll { .. } => Ok(bytes(&own(from)?)?.saturating_add(bytes(&own(to)?)?)),
        Conversion::Redeal { dim, .. } => {
            let cut = Cut::of(dtype, &own(from)?, *dim)?;
            let whole = cut.piece(starts(&parts(from, *dim)?).1)?;
            Ok(dealing(&cut, whole))
        }
        Conversion::AllReduce { .. }
        | Conversion::ReduceScatter { .. }
        | Conversion::ShardSlice { .. }
        | Conversion::OnlyFirst { .. }
        | Conversion::TreeReduce { .. }
        | Conversion::Transfer => Ok(0),
    }
}

/// Whether a conversion that NCCL carries is a call of the library and nothing besides, so that it can be made in another
/// queue than the main one, in which copies are.
pub(in crate::cuda) fn goes_aside(
    conversion: &Conversion,
    families: [&Family; 2],
    place: &Place<'_>,
) -> Result<bool, String> {
    let group = Group::new(place.mesh.group(place.rank, conversion.axes())).map_err(|e| e.to_string())?;
    if group.len() < 2 || staged(conversion, families, place)? > 0 {
        return Ok(false);
    }
    let [from, to] = families;
    Ok(match conversion {
        Conversion::AllReduce { .. } => true,
        Conversion::AllGather { dim, .. } => are_equal(&extents(from, place, &group, *dim)?),
        Conversion::ReduceScatter { dim, .. } => are_equal(&extents(to, place, &group, *dim)?),
        Conversion::AllToAll { .. }
        | Conversion::Redeal { .. }
        | Conversion::ShardSlice { .. }
        | Conversion::OnlyFirst { .. }
        | Conversion::TreeReduce { .. }
        | Conversion::Transfer => false,
    })
}

/// Of an all-gather to `bytes`: all of it, unless every piece arrives where it belongs.
pub(super) fn gathering(to: &Cut, bytes: u64, alone: bool) -> u64 {
    if to.is_dense() || alone { 0 } else { bytes }
}

/// Equal blocks, one for each member, in which shares are sent to be combined, and one more for what comes back.
pub(super) struct Blocks {
    /// Bytes of one.
    pub(super) block: u64,
    /// Bytes of those that are sent.
    pub(super) sent: u64,
}

impl Blocks {
    pub(super) fn bytes(&self) -> u64 {
        self.sent.saturating_add(self.block)
    }
}

/// Of a reduce-scatter to shares of these extents; nothing if they lie as NCCL wants them.
pub(super) fn scattering(from: &Cut, extents: &[usize]) -> Result<Option<Blocks>, String> {
    if are_equal(extents) && from.is_dense() {
        return Ok(None);
    }
    let block = from.piece(extents.iter().copied().max().unwrap_or(0))?;
    let sent = block.checked_mul(extents.len() as u64).ok_or_else(|| "pieces beyond memory".to_owned())?;
    Ok(Some(Blocks { block, sent }))
}

/// Of a new deal of `whole` bytes: all of them, and their pieces if they do not arrive where they belong.
pub(super) fn dealing(from: &Cut, whole: u64) -> u64 {
    whole.saturating_add(if from.is_dense() { 0 } else { whole })
}
