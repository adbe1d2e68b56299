//! `tpshard compare`: two files of tensors against each other.

use super::{check_tolerances, comparison_json, tolerances};
use crate::arguments::CompareArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::{output, tensors};

pub(crate) fn compare(arguments: &CompareArguments, json: bool) -> Outcome<()> {
    let tolerances = tolerances(&arguments.tolerance)?;
    let got = tensors::read(&arguments.got, &[])?;
    let expected = tensors::read_expected(&arguments.expected, &[])?;
    check_tolerances(&tolerances, expected.keys())?;
    let comparison = tpshard_runtime::io::compare(&got, &expected, &tolerances);
    let result = json.then(|| comparison_json("compare", &comparison));
    if result.is_none() {
        output::line(format_args!("compare\n{comparison}"))?;
    }
    if !comparison.passed() {
        return Err(Failure::new(Kind::Mismatch, "the tensors differ").with_result(result));
    }
    result.map_or(Ok(()), output::line)
}
