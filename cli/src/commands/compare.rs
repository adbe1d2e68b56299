//! `tpshard compare`: two files of tensors against each other.

use super::tolerances;
use crate::arguments::CompareArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::tensors;

pub(crate) fn compare(arguments: &CompareArguments, json: bool) -> Outcome<()> {
    let got = tensors::read(&arguments.got, &[])?;
    let expected = tensors::read_expected(&arguments.expected, &[])?;
    let comparison = tpshard_runtime::io::compare(&got, &expected, &tolerances(&arguments.tolerance)?);
    super::print_comparison("compare", &comparison, json);
    if comparison.passed() { Ok(()) } else { Err(Failure::new(Kind::Mismatch, "the tensors differ")) }
}
