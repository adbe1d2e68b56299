//! Layouts that people fix: the lines of pin files, the annotations of the model, and the values of the plan that they
//! are about. `docs/pins.md` describes the form.

use super::names::{Names, Pattern, Sort, shown};
use crate::arguments::PricingArguments;
use crate::failure::{Failure, Kind, Outcome};
use crate::output;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use tpshard_frontend::{Annotation, Imported, Named, Sharding, annotations, pipeline_stages};
use tpshard_ir::ValueId;
use tpshard_passes::Pin;
use tpshard_passes::extended::Extended;
use tpshard_passes::places::{Place, PlaceError, Places};

/// Largest pin file that is read.
const MAX_FILE: u64 = 16 << 20;

/// A layout as people write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    Replicated,
    /// A dim, counted from the end if it is negative.
    Split(i64),
}

impl Wanted {
    /// `R` or `S(DIM)`; what is wrong with it otherwise.
    fn parse(text: &str) -> Result<Wanted, &'static str> {
        if text == "R" {
            return Ok(Wanted::Replicated);
        }
        let inner = text.strip_prefix("S(").and_then(|t| t.strip_suffix(')')).ok_or("not a layout")?;
        if inner.contains(',') {
            return Err("units are chosen by tpshard");
        }
        inner.trim().parse().map(Wanted::Split).map_err(|_| "not a dim")
    }

    /// The dim of a tensor of this rank; none for replicated.
    fn dim(self, rank: usize) -> Option<Option<usize>> {
        let Wanted::Split(dim) = self else { return Some(None) };
        let from_end = i64::try_from(rank).ok()?.checked_add(dim);
        let dim = if dim < 0 { from_end? } else { dim };
        usize::try_from(dim).ok().filter(|&dim| dim < rank).map(Some)
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Wanted::Replicated => f.write_str("R"),
            Wanted::Split(dim) => write!(f, "S({dim})"),
        }
    }
}

/// One line of a pin file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// File and line number.
    place: String,
    sort: Sort,
    pattern: Pattern,
    wanted: Wanted,
}

/// The lines of a pin file.
pub(crate) fn parse(file: &str, text: &str) -> Outcome<Vec<Line>> {
    let mut lines = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        // A comment may follow, after a blank: names may hold a `#`.
        let line = line.split_once(" #").map_or(line, |(line, _)| line).trim_end();
        let place = format!("{file}:{}", index + 1);
        let refuse = |what: &str| {
            let help = "help: a line is e.g. `tensor model.layers.*.down_proj.weight = S(1)` or `node /lm_head/MatMul = R`";
            Failure::new(Kind::Usage, format!("{place}: {what}\n{help}"))
        };
        let (sort, rest) =
            line.split_once(char::is_whitespace).ok_or_else(|| refuse("not a pin: it is one word"))?;
        let sort = [Sort::Tensor, Sort::Node].into_iter().find(|s| s.name() == sort);
        let sort = sort.ok_or_else(|| refuse("neither `tensor` nor `node` comes first"))?;
        let (name, layout) = rest.rsplit_once('=').ok_or_else(|| refuse("no `= LAYOUT` follows"))?;
        let (name, layout) = (name.trim(), layout.trim());
        if name.is_empty() {
            return Err(refuse("the name is missing"));
        }
        let wanted = Wanted::parse(layout)
            .map_err(|what| refuse(&format!("layout {}: {what}; write R or S(DIM)", shown(layout))))?;
        lines.push(Line { place, sort, pattern: Pattern::new(name), wanted });
    }
    Ok(lines)
}

/// What the flags and the model fix.
pub(crate) struct Wishes {
    lines: Vec<Line>,
    annotations: Vec<Annotation>,
}

impl Wishes {
    pub(crate) fn read(arguments: &PricingArguments, imported: &Imported) -> Outcome<Wishes> {
        let mut lines = Vec::new();
        for path in &arguments.pin {
            lines.extend(parse(&path.display().to_string(), &text(path)?)?);
        }
        let ignored = arguments.ignore_annotations;
        let stages = pipeline_stages(&imported.model).len();
        if stages > 1 && !ignored {
            output::say(format_args!(
                "warning: the model asks for {stages} pipeline stages, which are not made: all ranks run all nodes\n\
                 help: --ignore-annotations says so without a warning"
            ));
        }
        let annotations = if ignored { Vec::new() } else { annotations(&imported.model) };
        Ok(Wishes { lines, annotations })
    }

    /// What is wanted of the values of every canonical graph, per number of ranks. What is fixed in none of several graphs
    /// is refused; a graph need not have all of it.
    pub(crate) fn pins(
        &self,
        graphs: &[Imported],
        extended: &[Extended],
        ranks: &[usize],
    ) -> Outcome<Vec<BTreeMap<usize, Vec<Pin>>>> {
        if self.lines.is_empty() && self.annotations.is_empty() {
            return Ok(vec![BTreeMap::new(); graphs.len()]);
        }
        let mut resolvers: Vec<(Resolver<'_>, Fixed)> = graphs
            .iter()
            .zip(extended)
            .map(|(imported, extended)| (Resolver::new(imported, extended), Fixed::default()))
            .collect();
        for line in &self.lines {
            let tried = resolvers.iter_mut().map(|(resolver, fixed)| resolver.line(line, fixed));
            let absent = tried.collect::<Outcome<Vec<Option<Failure>>>>()?;
            if absent.iter().all(Option::is_some)
                && let Some(failure) = absent.into_iter().flatten().next()
            {
                return Err(failure);
            }
        }
        let mut found = vec![BTreeMap::new(); graphs.len()];
        for &ranks in ranks {
            let mut fixed: Vec<Fixed> = resolvers.iter().map(|(_, fixed)| fixed.clone()).collect();
            self.annotated(ranks, &resolvers, &mut fixed)?;
            found.iter_mut().zip(fixed).for_each(|(found, fixed)| {
                found.insert(ranks, fixed.pins());
            });
        }
        self.warn_of_other_numbers(ranks);
        Ok(found)
    }

    fn annotated(
        &self,
        ranks: usize,
        resolvers: &[(Resolver<'_>, Fixed)],
        fixed: &mut [Fixed],
    ) -> Outcome<()> {
        let mut without_place: Vec<&Annotation> = Vec::new();
        for annotation in self.annotations.iter().filter(|a| a.devices == ranks as i64 && ranks > 1) {
            let mut placed = false;
            for ((resolver, _), fixed) in resolvers.iter().zip(fixed.iter_mut()) {
                placed |= resolver.annotation(annotation, fixed)?;
            }
            if !placed {
                without_place.push(annotation);
            }
        }
        if let Some(first) = without_place.first() {
            output::say(format_args!(
                "warning: {} annotated tensors are not computed as such in the plan and stay undecided, the first is {}",
                without_place.len(),
                annotation_place(first)
            ));
        }
        Ok(())
    }

    fn warn_of_other_numbers(&self, ranks: &[usize]) {
        let used = |a: &Annotation| ranks.iter().any(|&ranks| a.devices == ranks as i64);
        let Some(first) = self.annotations.first() else { return };
        if self.annotations.iter().any(used) || ranks.iter().all(|&ranks| ranks <= 1) {
            return;
        }
        output::say(format_args!(
            "warning: the model's sharding annotations are for {} devices and are not used\n\
             help: --ignore-annotations says so without a warning",
            first.devices
        ));
    }
}

/// The text of a pin file.
fn text(path: &Path) -> Outcome<String> {
    let help = "help: --pin names a text file; docs/pins.md describes it";
    let refuse = |what: &dyn std::fmt::Display| {
        Failure::new(Kind::Resource, format!("{}: {what}\n{help}", path.display()))
    };
    let found = std::fs::metadata(path).map_err(|e| refuse(&e))?;
    if !found.is_file() || found.len() > MAX_FILE {
        return Err(refuse(&format!("is not a text file of at most {MAX_FILE} bytes")));
    }
    std::fs::read_to_string(path).map_err(|e| refuse(&e))
}

/// The texts of the pin files, for the record.
pub(crate) fn record(arguments: &PricingArguments) -> Outcome<Value> {
    let mut files = Vec::new();
    for path in &arguments.pin {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        files.push(json!({ "file": name, "text": text(path)? }));
    }
    Ok(json!({ "files": files, "ignore_annotations": arguments.ignore_annotations }))
}

fn annotation_place(annotation: &Annotation) -> String {
    format!("{} in the annotation of {}", shown(&annotation.tensor), annotation.node)
}

/// What is fixed so far, by value.
#[derive(Clone, Default)]
struct Fixed(BTreeMap<ValueId, Wish>);

#[derive(Clone)]
struct Wish {
    dim: Option<usize>,
    /// The dim of the tensor as the model has it.
    own: Option<usize>,
    /// As written.
    wanted: Wanted,
    /// The tensor and where it was asked for.
    name: String,
}

impl Fixed {
    fn add(&mut self, place: Place, wish: &Wish) -> Outcome<()> {
        match self.0.get(&place.value) {
            Some(other) if other.dim != place.dim => {
                let message = format!(
                    "{} as {} contradicts {} as {}\nhelp: remove one of the two{}",
                    wish.name,
                    wish.wanted,
                    other.name,
                    other.wanted,
                    annotation_help(&[&wish.name, &other.name])
                );
                Err(Failure::new(Kind::Usage, message))
            }
            Some(_) => Ok(()),
            None => {
                self.0.insert(place.value, Wish { dim: place.dim, ..wish.clone() });
                Ok(())
            }
        }
    }

    fn pins(self) -> Vec<Pin> {
        let name = |wish: Wish| match wish.dim == wish.own {
            true => wish.name,
            false => format!("{} as {}, in the form that the plan uses,", wish.name, wish.wanted),
        };
        self.0.into_iter().map(|(value, wish)| Pin { value, dim: wish.dim, name: name(wish) }).collect()
    }
}

/// What to do besides if one of the names is that of an annotation.
pub(crate) fn annotation_help(names: &[&str]) -> &'static str {
    if names.iter().any(|name| name.contains("in the annotation of node")) {
        ", or leave the model's annotations aside with --ignore-annotations"
    } else {
        ""
    }
}

/// Finds tensors in the canonical graph.
pub(crate) struct Resolver<'a> {
    pub(crate) names: Names<'a>,
    places: Places<'a>,
}

impl<'a> Resolver<'a> {
    pub(crate) fn new(imported: &'a Imported, extended: &'a Extended) -> Resolver<'a> {
        Resolver { names: Names::new(imported), places: Places::new(extended) }
    }

    /// The values that hold a tensor, and where its `dim` is there.
    pub(crate) fn places(&self, tensor: &str, dim: Option<usize>) -> Result<Vec<Place>, PlaceError> {
        match self.names.tensors.get(tensor) {
            Some(Named::Data(value)) => self.places.of_value(*value, dim),
            Some(Named::Weight(expr)) => self.places.of_weight(expr, dim),
            Some(Named::Folded) | None => Err(PlaceError::Folded),
        }
    }

    /// Fixes what a line is about; why not, if the graph has nothing of it.
    fn line(&self, line: &Line, fixed: &mut Fixed) -> Outcome<Option<Failure>> {
        let tensors = self.names.matching(line.sort, &line.pattern);
        if tensors.is_empty() {
            return Ok(Some(self.names.unknown(&line.place, line.sort, &line.pattern)));
        }
        let mut refused = None;
        let mut found = 0;
        for tensor in tensors {
            let name = format!("{} ({})", shown(tensor), line.place);
            match self.wish(tensor, line.wanted, &name, fixed)? {
                Ok(()) => found += 1,
                Err(error) => refused = refused.or(Some((name, error))),
            }
        }
        match refused {
            // Patterns also match what has no place in a plan.
            Some((name, error)) if error != PlaceError::Folded => Err(unplaced(&name, line.wanted, &error)),
            Some((name, error)) if found == 0 => Ok(Some(unplaced(&name, line.wanted, &error))),
            _ => Ok(None),
        }
    }

    /// Fixes a tensor; what is in the way of that is left to the caller unless it is a contradiction.
    fn wish(
        &self,
        tensor: &str,
        wanted: Wanted,
        name: &str,
        fixed: &mut Fixed,
    ) -> Outcome<Result<(), PlaceError>> {
        let Some((dtype, dims)) = self.names.shape(tensor) else { return Ok(Err(PlaceError::Folded)) };
        let Some(dim) = wanted.dim(dims.len()) else {
            let message = format!(
                "{name} as {wanted}: the tensor is {dtype}[{}]\nhelp: dims count from 0; S(-1) is the last{}",
                dims.join(", "),
                annotation_help(&[name])
            );
            return Err(Failure::new(Kind::Usage, message));
        };
        let places = match self.places(tensor, dim) {
            Ok(places) => places,
            Err(error) => return Ok(Err(error)),
        };
        let wish = Wish { dim, own: dim, wanted, name: name.to_owned() };
        places.into_iter().try_for_each(|place| fixed.add(place, &wish)).map(Ok)
    }

    /// Fixes what an annotation says; false if no value of the plan is what it is about.
    fn annotation(&self, annotation: &Annotation, fixed: &mut Fixed) -> Outcome<bool> {
        let name = annotation_place(annotation);
        let wanted = match &annotation.sharding {
            Ok(Sharding::Whole) => Wanted::Replicated,
            Ok(Sharding::Split { axis }) => Wanted::Split(*axis),
            Err(what) => {
                let message = format!(
                    "{name}: {what}; plans hold a tensor whole, or split one dim over all ranks in order\n\
                     help: leave the model's annotations aside with --ignore-annotations"
                );
                return Err(Failure::new(Kind::Model, message));
            }
        };
        match self.wish(&annotation.tensor, wanted, &name, fixed)? {
            Ok(()) => Ok(true),
            Err(PlaceError::Folded) => Ok(false),
            Err(error) => Err(unplaced(&name, wanted, &error)),
        }
    }
}

fn unplaced(name: &str, wanted: Wanted, error: &PlaceError) -> Failure {
    let help = match error {
        PlaceError::Folded => "pin an operand of it, or what it is an operand of",
        PlaceError::Merged { .. } | PlaceError::Joined { .. } => "pin another dim, or R",
    };
    let message = format!("{name} as {wanted}: {error}\nhelp: {help}{}", annotation_help(&[name]));
    Failure::new(Kind::Usage, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let text = "# all layers\n\ntensor model.*.down.weight = S(-1)  # rows\n  node a b=c = R\r\ntensor w#1=S( 0 )";
        let lines = parse("p", text).unwrap();
        let found: Vec<_> =
            lines.iter().map(|l| (l.place.as_str(), l.sort, l.pattern.text.as_str(), l.wanted)).collect();
        let expected = [
            ("p:3", Sort::Tensor, "model.*.down.weight", Wanted::Split(-1)),
            ("p:4", Sort::Node, "a b=c", Wanted::Replicated),
            ("p:5", Sort::Tensor, "w#1", Wanted::Split(0)),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn wrong_lines_are_refused_with_their_place() {
        let cases = [
            ("tensor", "one word"),
            ("weight w = R", "neither"),
            ("tensor w", "LAYOUT"),
            ("tensor = R", "name is missing"),
            ("tensor w = P(sum)", "not a layout"),
            ("tensor w = S(1, 16)", "units are chosen"),
            ("tensor w = S(one)", "not a dim"),
            ("tensor w = ", "not a layout"),
        ];
        for (text, word) in cases {
            let failure = parse("file", &format!("\n{text}")).unwrap_err();
            assert!(failure.message.starts_with("file:2: ") && failure.message.contains(word), "{failure}");
            assert!(failure.message.contains("help: "), "{failure}");
        }
    }

    #[test]
    fn dims_count_from_either_end() {
        assert_eq!(Wanted::Split(-1).dim(2), Some(Some(1)));
        assert_eq!(Wanted::Split(1).dim(2), Some(Some(1)));
        assert_eq!(Wanted::Split(2).dim(2), None);
        assert_eq!(Wanted::Split(-3).dim(2), None);
        assert_eq!(Wanted::Split(i64::MIN).dim(2), None);
        assert_eq!(Wanted::Replicated.dim(0), Some(None));
    }
}
