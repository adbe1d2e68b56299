//! `--dtype`: imported graphs in another precision, before anything else looks at them.

use crate::arguments::Precision;
use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use tpshard_frontend::{Imported, Named};
use tpshard_passes::precision::{PrecisionError, narrowed, products};

/// Rewrites the graphs; names of the model stand for what their values became.
pub(crate) fn convert(graphs: &mut [Imported], precision: Precision) -> Outcome<()> {
    let to = precision.dtype();
    let mut converted = 0;
    for imported in graphs.iter_mut() {
        let found = narrowed(&imported.graph, to).map_err(|error| {
            let kind = match &error {
                PrecisionError::Other { .. } | PrecisionError::Target { .. } => Kind::Usage,
                PrecisionError::Infer { .. } => Kind::Internal,
            };
            Failure::new(kind, format!("--dtype {to}: {error}"))
        })?;
        converted += found.products;
        for named in imported.report.values.values_mut() {
            if let Named::Data(value) = named {
                let place = found.values.get(value.index()).copied().flatten();
                *named = place.map_or(Named::Folded, Named::Data);
            }
        }
        imported.graph = found.graph;
    }
    let already = graphs.iter().flat_map(|imported| products(&imported.graph)).any(|dtype| dtype == to);
    if converted == 0 && !already {
        output::say(format_args!("note: --dtype {to} changes nothing: the model has no products of f32"));
    }
    Ok(())
}
