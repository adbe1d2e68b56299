//! Slots by number: which of them exist, of those that were never stepped too.

use crate::fail::{Code, Fail, Outcome};
use crate::handle::Handle;
use std::collections::BTreeSet;
use std::path::Path;
use tpshard_runtime::io::DEFAULT_LIMIT;
use tpshard_runtime::session::Session;
use tpshard_runtime::state::SlotId;

pub(crate) struct Slots {
    stateful: bool,
    next: u64,
    /// Made and not stepped yet; the session does not know them.
    empty: BTreeSet<u64>,
}

impl Slots {
    pub(crate) fn new(stateful: bool) -> Slots {
        Slots { stateful, next: 0, empty: BTreeSet::new() }
    }

    /// Refuses slots that were not made, or are dropped.
    pub(crate) fn check(&self, session: &Session, slots: &[u64]) -> Outcome<()> {
        self.check_stateful()?;
        let is_there =
            |slot: &&u64| self.empty.contains(slot) || session.slot_length(SlotId(**slot)).is_some();
        match slots.iter().find(|slot| !is_there(slot)) {
            None => Ok(()),
            Some(slot) => Err(Fail::usage(format!(
                "there is no slot {slot}\n  help: tpshard_slot_new, tpshard_slot_fork and tpshard_slot_load make slots"
            ))),
        }
    }

    fn check_stateful(&self) -> Outcome<()> {
        if self.stateful {
            return Ok(());
        }
        Err(Fail::usage("the session keeps no state\n  help: open it with slots and capacity"))
    }

    pub(crate) fn stepped(&mut self, slots: &[u64]) {
        for slot in slots {
            self.empty.remove(slot);
        }
    }

    /// A number that no slot has had.
    fn number(&mut self) -> Outcome<u64> {
        self.check_stateful()?;
        let number = self.next;
        self.next += 1;
        Ok(number)
    }
}

impl Handle {
    pub(crate) fn slot_new(&self) -> Outcome<u64> {
        let mut open = self.lead()?;
        let slot = open.slots.number()?;
        open.slots.empty.insert(slot);
        Ok(slot)
    }

    pub(crate) fn slot_fork(&self, from: u64) -> Outcome<u64> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check(&open.session, &[from])?;
        let slot = open.slots.number()?;
        if open.slots.empty.contains(&from) {
            open.slots.empty.insert(slot);
        } else {
            open.session.fork(SlotId(from), SlotId(slot))?;
        }
        Ok(slot)
    }

    pub(crate) fn slot_truncate(&self, slot: u64, length: u64) -> Outcome<()> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check(&open.session, &[slot])?;
        if open.slots.empty.contains(&slot) && length == 0 {
            return Ok(());
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        Ok(open.session.truncate(SlotId(slot), length)?)
    }

    pub(crate) fn slot_drop(&self, slot: u64) -> Outcome<()> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check(&open.session, &[slot])?;
        if open.slots.empty.remove(&slot) {
            return Ok(());
        }
        Ok(open.session.drop_slot(SlotId(slot))?)
    }

    pub(crate) fn slot_length(&self, slot: u64) -> Outcome<u64> {
        let open = self.lead()?;
        open.slots.check(&open.session, &[slot])?;
        Ok(open.session.slot_length(SlotId(slot)).unwrap_or(0) as u64)
    }

    /// The file is there complete or not at all.
    pub(crate) fn slot_save(&self, slot: u64, path: &Path) -> Outcome<()> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check(&open.session, &[slot])?;
        let bytes = open.session.save_slot(SlotId(slot))?;
        let unwritable = |error: std::io::Error| {
            let help = "help: name a file in a folder that exists and can be written";
            Fail::new(Code::Resources, format!("{}: cannot be written: {error}\n  {help}", path.display()))
        };
        let name = path.file_name().ok_or_else(|| unwritable(std::io::ErrorKind::InvalidFilename.into()))?;
        let temporary =
            path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, path));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written.map_err(unwritable)
    }

    pub(crate) fn slot_load(&self, path: &Path) -> Outcome<u64> {
        let mut open = self.lead()?;
        let open = &mut *open;
        open.slots.check_stateful()?;
        let unreadable = |what: String| {
            let help = "help: name a file that tpshard_slot_save wrote";
            Fail::new(Code::Resources, format!("{}: {what}\n  {help}", path.display()))
        };
        let found = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?;
        if !found.is_file() || found.len() > DEFAULT_LIMIT {
            return Err(unreadable(format!("is no file of at most {DEFAULT_LIMIT} bytes")));
        }
        let bytes = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
        let slot = open.slots.number()?;
        let loaded = open.session.load_slot(SlotId(slot), &bytes);
        loaded.map_err(|error| {
            let Fail { code, message } = Fail::from(error);
            Fail { code, message: format!("{}: {message}", path.display()) }
        })?;
        Ok(slot)
    }
}
