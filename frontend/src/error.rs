//! What can be wrong with a model, and where.
//!
//! A [`Fault`] is one problem: what kind it is, where it sits (node, operator, opset, value, byte), what is wrong and
//! what to do about it. Loading collects several of them, so that a broken model is mended in one round, and returns
//! them together with the file as one [`LoadError`].

use std::fmt;
use std::path::PathBuf;

/// How many faults a [`LoadError`] shows; further ones are counted.
pub const FAULTS_SHOWN: usize = 20;

/// The longest part of a model's name that is printed.
const NAME_SHOWN: usize = 120;

/// What sort of problem it is, for callers that choose an exit code or retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ErrorKind {
    /// The file breaks the ONNX format.
    Invalid,
    /// The file is or may be right, but asks for something this version does not do.
    Unsupported,
    /// What decides a shape is known only when the model runs.
    DataDependent,
    /// Reading it would take more memory or work than the limits allow.
    Resource,
    /// The operating system refused.
    Io,
    /// What was asked for on the way in (outputs, bound inputs, roles) does not fit the model.
    Request,
}

/// A node as error messages name it.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct NodeSite {
    pub name: String,
    pub op_type: String,
    /// Empty for the default domain.
    pub domain: String,
    /// Unknown while the domain's import has not been found.
    pub opset: Option<i64>,
    /// The first named output, which identifies a node without a name.
    pub output: String,
}

/// Where a fault is. Every part may be unknown.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Site {
    pub node: Option<Box<NodeSite>>,
    /// A tensor, graph input, graph output or attribute.
    pub value: Option<String>,
    /// Offset into the model file.
    pub byte: Option<u64>,
}

/// One problem in a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub kind: ErrorKind,
    pub site: Site,
    pub message: String,
    pub help: String,
}

/// Why a model could not be loaded: the file, and one fault or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadError {
    pub file: PathBuf,
    /// At least one, at most [`FAULTS_SHOWN`].
    pub faults: Vec<Fault>,
    /// Faults found beyond those kept.
    pub omitted: usize,
}

/// A name from a model, safe to print: escaped, quoted and cut.
pub fn quote(name: &str) -> String {
    let mut shown: String = name.chars().take(NAME_SHOWN).flat_map(char::escape_debug).collect();
    if name.chars().nth(NAME_SHOWN).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

/// As much of a name as is ever printed. Faults may be many and names long, so they never hold whole ones.
pub(crate) fn clip(name: &str) -> String {
    name.chars().take(NAME_SHOWN + 1).collect()
}

/// The domain as people write it: the default one has a name too.
pub fn domain_name(domain: &str) -> &str {
    if domain.is_empty() { "ai.onnx" } else { domain }
}

impl Fault {
    fn new(kind: ErrorKind, message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault { kind, site: Site::default(), message: message.into(), help: help.into() }
    }

    /// The file breaks the format.
    pub fn invalid(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Invalid, message, help)
    }

    /// Right or not, this version does not do it.
    pub fn unsupported(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Unsupported, message, help)
    }

    /// A shape depends on data.
    pub fn data_dependent(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::DataDependent, message, help)
    }

    /// Beyond the limits.
    pub fn resource(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Resource, message, help)
    }

    /// The operating system refused.
    pub fn io(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Io, message, help)
    }

    /// What was asked for does not fit the model.
    pub fn request(message: impl Into<String>, help: impl Into<String>) -> Fault {
        Fault::new(ErrorKind::Request, message, help)
    }

    /// Says which node it is about.
    #[must_use]
    pub fn at_node(mut self, node: NodeSite) -> Fault {
        self.site.node = Some(Box::new(node));
        self
    }

    /// Says which tensor, input, output or attribute it is about.
    #[must_use]
    pub fn at_value(mut self, value: &str) -> Fault {
        self.site.value = Some(clip(value));
        self
    }

    /// Says where in the file it is.
    #[must_use]
    pub fn at_byte(mut self, byte: u64) -> Fault {
        self.site.byte = Some(byte);
        self
    }
}

impl fmt::Display for NodeSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.name.is_empty() {
            write!(f, "node {}", quote(&self.name))?;
        } else if !self.output.is_empty() {
            write!(f, "node making {}", quote(&self.output))?;
        } else {
            f.write_str("unnamed node")?;
        }
        let domain = quote(domain_name(&self.domain));
        write!(f, " ({}, {}", quote(&self.op_type).trim_matches('`'), domain.trim_matches('`'))?;
        match self.opset {
            Some(version) => write!(f, " {version})"),
            None => f.write_str(")"),
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        if let Some(node) = &self.node {
            write!(f, "{node}")?;
            separator = ", ";
        }
        if let Some(value) = &self.value {
            write!(f, "{separator}{}", quote(value))?;
            separator = ", ";
        }
        if let Some(byte) = self.byte {
            write!(f, "{separator}byte {byte}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.site != Site::default() {
            write!(f, "{}: ", self.site)?;
        }
        write!(f, "{}\n  help: {}", self.message, self.help)
    }
}

impl std::error::Error for Fault {}

impl LoadError {
    /// One fault in one file.
    pub fn new(file: impl Into<PathBuf>, fault: Fault) -> LoadError {
        LoadError { file: file.into(), faults: vec![fault], omitted: 0 }
    }

    /// The kind of the first fault.
    pub fn kind(&self) -> ErrorKind {
        self.faults.first().map_or(ErrorKind::Invalid, |fault| fault.kind)
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for fault in &self.faults {
            write!(f, "{separator}{}: {fault}", self.file.display().to_string().escape_debug())?;
            separator = "\n";
        }
        if self.omitted > 0 {
            write!(f, "\nand {} more", self.omitted)?;
        }
        Ok(())
    }
}

impl std::error::Error for LoadError {}

/// Gathers faults up to [`FAULTS_SHOWN`] and counts the rest.
#[derive(Debug, Default)]
pub struct Faults {
    kept: Vec<Fault>,
    omitted: usize,
}

impl Faults {
    pub fn push(&mut self, fault: Fault) {
        if self.kept.len() < FAULTS_SHOWN {
            self.kept.push(fault);
        } else {
            self.omitted += 1;
        }
    }

    /// Keeps the value of a step that worked, or its fault.
    pub fn keep<T>(&mut self, result: Result<T, Fault>) -> Option<T> {
        result.map_err(|fault| self.push(fault)).ok()
    }

    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Succeeds if nothing was found.
    ///
    /// # Errors
    /// Everything that was pushed.
    pub fn finish(self, file: impl Into<PathBuf>) -> Result<(), LoadError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        Err(LoadError { file: file.into(), faults: self.kept, omitted: self.omitted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_names_file_node_operator_domain_opset_and_remedy() {
        let node = NodeSite {
            name: "n1".into(),
            op_type: "Conv".into(),
            domain: String::new(),
            opset: Some(17),
            output: String::new(),
        };
        let fault = Fault::invalid("group is 0", "export again").at_node(node).at_value("group");
        let text = LoadError::new("a/m.onnx", fault).to_string();
        assert_eq!(text, "a/m.onnx: node `n1` (Conv, ai.onnx 17), `group`: group is 0\n  help: export again");
    }

    #[test]
    fn names_cannot_write_to_the_terminal() {
        assert_eq!(quote("a\u{1b}[2J\n"), "`a\\u{1b}[2J\\n`");
        assert!(quote(&"x".repeat(10_000)).chars().count() < 200);
    }

    #[test]
    fn faults_are_capped_and_counted() {
        let mut faults = Faults::default();
        for i in 0..50 {
            faults.push(Fault::invalid(format!("{i}"), "none"));
        }
        let error = faults.finish("m").unwrap_err();
        assert_eq!((error.faults.len(), error.omitted), (FAULTS_SHOWN, 30));
        assert!(error.to_string().ends_with("and 30 more"));
    }
}
