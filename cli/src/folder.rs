//! A finished folder: what `config.json` says, and where its files are.

use crate::arguments::Device;
use crate::failure::{Failure, Kind, Outcome};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tpshard_codegen::build::{CONFIG_VERSION, OLDEST_CONFIG_VERSION};
use tpshard_codegen::folder::{CONFIG, CONFIG_FORMAT};

/// Largest `config.json` that is read.
const MAX_CONFIG: u64 = 256 << 20;

pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) config: Value,
    pub(crate) ranks: usize,
    /// Where its programs are run.
    pub(crate) device: Device,
}

impl Folder {
    pub(crate) fn open(path: &Path) -> Outcome<Folder> {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
        let file = path.join(CONFIG);
        let refuse = |kind, what: String| {
            let help = "help: name a folder that `tpshard MODEL --tp N` wrote";
            Failure::new(kind, format!("{}: {what}\n{help}", file.display()))
        };
        let length = std::fs::metadata(&file).map_err(|e| refuse(Kind::Resource, e.to_string()))?.len();
        if length > MAX_CONFIG {
            return Err(refuse(Kind::Resource, format!("{length} bytes are too many")));
        }
        let text = std::fs::read_to_string(&file).map_err(|e| refuse(Kind::Resource, e.to_string()))?;
        let config: Value =
            serde_json::from_str(&text).map_err(|e| refuse(Kind::Mismatch, format!("is not JSON: {e}")))?;
        if config.get("format").and_then(Value::as_str) != Some(CONFIG_FORMAT) {
            return Err(refuse(Kind::Mismatch, "is not tpshard's".into()));
        }
        let version = config.get("version");
        let known = u64::from(OLDEST_CONFIG_VERSION)..=u64::from(CONFIG_VERSION);
        if !version.and_then(Value::as_u64).is_some_and(|version| known.contains(&version)) {
            let found = version.map_or("no version".into(), |version| format!("version {version}"));
            let message = format!(
                "{}: {found}, this tpshard reads {OLDEST_CONFIG_VERSION} to {CONFIG_VERSION}\n\
                 help: build the folder again with this tpshard, or use the tpshard that built it",
                file.display()
            );
            return Err(Failure::new(Kind::Mismatch, message));
        }
        let ranks = config.get("ranks").and_then(Value::as_array).map_or(0, Vec::len);
        if !(1..=1024).contains(&ranks) {
            return Err(refuse(Kind::Mismatch, format!("lists {ranks} ranks")));
        }
        Ok(Folder { path, config, ranks, device: Device::Auto })
    }

    /// The same, run on `device`.
    pub(crate) fn on(self, device: Device) -> Folder {
        Folder { device, ..self }
    }

    pub(crate) fn executable(&self, rank: usize) -> PathBuf {
        self.path.join(format!("rank{rank}"))
    }

    /// Names of the inputs, or outputs, in order.
    pub(crate) fn names(&self, what: &str) -> Vec<String> {
        let list = self.config.pointer(&format!("/entries/0/{what}")).and_then(Value::as_array);
        list.into_iter()
            .flatten()
            .filter_map(|port| port.get("name").and_then(Value::as_str).map(str::to_owned))
            .collect()
    }

    pub(crate) fn text(&self, name: &str) -> Outcome<String> {
        let path = self.path.join(name);
        std::fs::read_to_string(&path)
            .map_err(|e| Failure::new(Kind::Resource, format!("{}: {e}", path.display())))
    }
}
