//! Signals to processes that a test started.

/// A signal that a test sends.
#[derive(Clone, Copy, Debug)]
pub enum Signal {
    /// The process ends at once.
    Kill,
    /// It is asked to end.
    Terminate,
    /// It stands still.
    Stop,
    /// It goes on.
    Continue,
}

impl Signal {
    fn number(self) -> libc::c_int {
        match self {
            Self::Kill => libc::SIGKILL,
            Self::Terminate => libc::SIGTERM,
            Self::Stop => libc::SIGSTOP,
            Self::Continue => libc::SIGCONT,
        }
    }
}

/// Sends a signal to a process that has not been waited for yet, so that its id is still its own.
pub fn send(pid: u32, signal: Signal) {
    let id = libc::pid_t::try_from(pid).expect("process ids fit");
    // SAFETY: `kill` takes two numbers and touches no memory of this process.
    let sent = unsafe { libc::kill(id, signal.number()) };
    let error = std::io::Error::last_os_error();
    assert_eq!(sent, 0, "process {pid} cannot be signalled: {error}");
}
