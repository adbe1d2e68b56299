//! A device's second queue, and the marks by which the two wait for each other and the host sees how far they are.
#![allow(unsafe_code)] // Calls into a C library.

use super::{Device, NO_TIMES, NON_BLOCKING, Queue};
use crate::error::DriverError;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Which of a device's queues.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lane {
    #[default]
    Main,
    /// Beside it, once it is [open](Device::open_side); the main queue until then.
    Side,
}

impl Device {
    /// A mark that can be put into the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn event(&self) -> Result<Event, DriverError> {
        self.0.enter()?;
        let f = &self.0.functions;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer lives through the call.
        f.checked(unsafe { f.create_event(&mut handle, NO_TIMES) })?;
        Ok(Event { queue: self.0.clone(), handle: handle as usize })
    }

    /// Makes the second queue, if there is none yet. What is in it is begun before what is ready in the main queue, as far as
    /// the driver knows such things: a collective needs little of the device, and would wait for a product that fills it.
    ///
    /// # Errors
    /// The driver fails.
    pub fn open_side(&self) -> Result<(), DriverError> {
        if self.0.side().is_some() {
            return Ok(());
        }
        self.0.enter()?;
        let f = &self.0.functions;
        let mut stream = std::ptr::null_mut();
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both integers live through the call.
        let range = f.checked(unsafe { f.priorities(&mut least, &mut greatest) });
        // SAFETY: the pointer lives through the call, the priority is one of the device's.
        let made = range
            .and_then(|()| f.checked(unsafe { f.create_urgent_stream(&mut stream, NON_BLOCKING, greatest) }));
        if made.is_err() {
            // SAFETY: as above.
            f.checked(unsafe { f.create_stream(&mut stream, NON_BLOCKING) })?;
        }
        let found =
            self.0.side.compare_exchange(0, stream as usize, Ordering::AcqRel, Ordering::Acquire).is_err();
        if found {
            // SAFETY: it was just made, and nothing is in it.
            let _ = unsafe { f.destroy_stream(stream) };
        }
        Ok(())
    }

    /// What is put into a queue from now on begins when `event` has passed, as it was recorded last. The host does not wait.
    ///
    /// # Errors
    /// The driver fails.
    pub fn wait_in(&self, lane: Lane, event: &Event) -> Result<(), DriverError> {
        self.0.enter()?;
        let f = &self.0.functions;
        // SAFETY: event and stream are alive; the driver keeps what it needs of the event.
        f.checked(unsafe { f.wait_event(self.0.stream_of(lane), event.handle as *mut c_void, 0) })
    }
}

/// A mark in the queue, which has passed when all work before it is done.
#[derive(Debug)]
pub struct Event {
    queue: Arc<Queue>,
    handle: usize,
}

impl Event {
    /// Puts the mark at the end of the queue.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record(&self) -> Result<(), DriverError> {
        self.record_in(Lane::Main)
    }

    /// Puts the mark at the end of one of the queues.
    ///
    /// # Errors
    /// The driver fails.
    pub fn record_in(&self, lane: Lane) -> Result<(), DriverError> {
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: event and stream are alive.
        f.checked(unsafe { f.record_event(self.handle as *mut c_void, self.queue.stream_of(lane)) })
    }

    /// Whether the mark has passed; does not wait.
    ///
    /// # Errors
    /// Some work failed.
    pub fn has_passed(&self) -> Result<bool, DriverError> {
        self.queue.enter()?;
        let f = &self.queue.functions;
        // SAFETY: the event is alive.
        f.is_done(unsafe { f.query_event(self.handle as *mut c_void) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.queue.enter().is_ok() {
            let f = &self.queue.functions;
            // SAFETY: made by `create_event`, destroyed once; the driver waits for nothing.
            let _ = unsafe { f.destroy_event(self.handle as *mut c_void) };
        }
    }
}
