//! A terminal for a process: the process has the one end of a pseudo-terminal, the test types at the other, and what is
//! printed becomes a screen.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::{DEADLINE, Scene};

/// How long nothing may be printed before it is looked whether the process still runs.
const LOOK: Duration = Duration::from_millis(20);

/// A process in a terminal; it is killed with the test.
pub struct Terminal {
    child: Child,
    keyboard: File,
    /// The process's end. It stays open here, so that its settings can be read when the process has ended.
    theirs: OwnedFd,
    printed: Receiver<Vec<u8>>,
    parser: vt100::Parser<Picture>,
}

/// Whether a picture is being drawn: what is on the screen then may be the half of it. ("Synchronized output", mode 2026.)
#[derive(Default)]
struct Picture {
    unfinished: bool,
}

impl vt100::Callbacks for Picture {
    fn unhandled_csi(
        &mut self,
        _: &mut vt100::Screen,
        mark: Option<u8>,
        _: Option<u8>,
        parameters: &[&[u16]],
        letter: char,
    ) {
        if mark == Some(b'?') && parameters == [&[2026]] {
            self.unfinished = letter == 'h';
        }
    }
}

impl Terminal {
    /// Starts `cohort` in a terminal of so many rows and columns.
    pub fn start(scene: &Scene, line: &str, size: (u16, u16)) -> Self {
        Self::start_with(scene, line, size, &[])
    }

    /// The same with variables in its environment.
    pub fn start_with(
        scene: &Scene,
        line: &str,
        (rows, columns): (u16, u16),
        variables: &[(&str, &str)],
    ) -> Self {
        let (ours, theirs) = open(rows, columns);
        let mut command = scene.cohort(line);
        command
            .env("TERM", "xterm-256color")
            .env_remove("NO_COLOR")
            .envs(variables.iter().copied());
        for set in [Command::stdin, Command::stdout, Command::stderr] {
            let end = theirs.try_clone().expect("it can be copied");
            set(&mut command, Stdio::from(end));
        }
        // SAFETY: between fork and exec only `setsid` and `ioctl` are called, which are safe there.
        unsafe {
            command.pre_exec(|| {
                // A terminal of its own: keys such as Ctrl-C and changes of size go to this process alone.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY as _, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().expect("the binary starts");
        let keyboard = File::from(ours);
        let mut reader = keyboard.try_clone().expect("it can be copied");
        let (sender, printed) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                if sender.send(bytes[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            keyboard,
            theirs,
            printed,
            parser: vt100::Parser::new_with_callbacks(
                cells(rows),
                cells(columns),
                0,
                Picture::default(),
            ),
        }
    }

    /// Types keys.
    pub fn press(&mut self, keys: &str) {
        let typed = self.keyboard.write_all(keys.as_bytes());
        typed.expect("keys can be typed");
    }

    /// Makes the terminal larger or smaller, and tells the process, as terminals do.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = winsize(rows, columns);
        // SAFETY: the descriptor is open, and the request reads one `winsize`.
        let done = unsafe { libc::ioctl(self.keyboard.as_raw_fd(), libc::TIOCSWINSZ as _, &size) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        self.parser.set_size(cells(rows), cells(columns));
    }

    /// Waits until the screen is as wanted, in a picture that is drawn to its end; gives it as text.
    pub fn wait_until(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let shown = self.shown();
            if !self.parser.callbacks().unfinished && wanted(&shown) {
                return shown;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.printed.recv_timeout(left) {
                Ok(bytes) => self.parser.process(&bytes),
                Err(_) => panic!("no {what} in time; the screen is\n{shown}"),
            }
        }
    }

    /// Waits until a text is on the screen.
    pub fn wait_for(&mut self, text: &str) -> String {
        self.wait_until(&format!("`{text}`"), |screen| screen.contains(text))
    }

    /// Waits for the end of the process and for all that it printed; gives its exit code.
    pub fn wait(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        let mut ended = None;
        loop {
            match self.printed.recv_timeout(LOOK) {
                Ok(bytes) => self.parser.process(&bytes),
                Err(RecvTimeoutError::Timeout) if ended.is_some() => return ended.flatten(),
                Err(RecvTimeoutError::Timeout) => {
                    let status = self.child.try_wait().expect("it can be waited for");
                    ended = status.map(|status| status.code());
                }
                Err(RecvTimeoutError::Disconnected) => panic!("this end of the terminal is open"),
            }
            assert!(
                Instant::now() < deadline,
                "it does not end:\n{}",
                self.shown()
            );
        }
    }

    /// The screen as text.
    pub fn shown(&self) -> String {
        self.parser.screen().contents()
    }

    /// Whether any letter on the screen has a colour.
    pub fn has_colours(&self) -> bool {
        let screen = self.parser.screen();
        let (rows, columns) = screen.size();
        (0..rows.get())
            .flat_map(|row| (0..columns.get()).map(move |column| (row, column)))
            .filter_map(|(row, column)| screen.cell(row, column))
            .any(|cell| cell.fgcolor() != vt100::Color::Default)
    }

    /// Checks that the terminal is as a shell wants it: the ordinary screen, a cursor, an echo, lines.
    pub fn assert_given_back(&self) {
        let screen = self.parser.screen();
        assert!(!screen.alternate_screen(), "the alternate screen is left");
        assert!(!screen.hide_cursor(), "the cursor is shown");
        // SAFETY: all bytes of a `termios` may be zero, and `tcgetattr` fills it from an open descriptor.
        let settings = unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            assert_eq!(libc::tcgetattr(self.theirs.as_raw_fd(), &mut settings), 0);
            settings
        };
        let wanted = libc::ECHO | libc::ICANON | libc::ISIG;
        assert_eq!(settings.c_lflag & wanted, wanted, "echo, lines and signals");
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).expect("a terminal has rows and columns")
}

fn winsize(rows: u16, columns: u16) -> libc::winsize {
    libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// A new pseudo-terminal: the test's end and the process's end.
fn open(rows: u16, columns: u16) -> (OwnedFd, OwnedFd) {
    let (mut ours, mut theirs) = (-1, -1);
    let mut size = winsize(rows, columns);
    // SAFETY: the pointers are to numbers and a size of this function, or null where that is allowed.
    let opened = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            &raw mut size,
        )
    };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    for end in [ours, theirs] {
        // SAFETY: the descriptor is open. Other processes of this test must not inherit it.
        let set = unsafe { libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
    // SAFETY: both were just opened, and nothing else owns them.
    unsafe { (OwnedFd::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}
