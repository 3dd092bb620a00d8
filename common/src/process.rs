//! What the system tells of this process: memory and processor time. Linux alone is asked, through `/proc`; elsewhere
//! nothing is known. And how many files it may have open, and how long it keeps memory that it has freed.

use std::ffi::c_long;

use libmimalloc_sys::{mi_option_get, mi_option_set, mi_option_t};

/// What a process uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Memory that it has in use, in bytes.
    pub rss_bytes: u64,
    /// Processor time that its threads have had, in microseconds.
    pub cpu_us: u64,
}

/// What this process uses; `None` where the platform does not tell.
pub fn usage() -> Option<Usage> {
    #[cfg(target_os = "linux")]
    {
        let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        Some(Usage {
            rss_bytes: resident_pages(&statm)? * rustix::param::page_size() as u64,
            cpu_us: cpu_ticks(&stat)? * 1_000_000 / ticks,
        })
    }
    #[cfg(not(target_os = "linux"))]
    None
}

/// `mi_option_purge_delay`: for how many milliseconds mimalloc keeps memory that was freed. The bindings do not name it.
const PURGE_DELAY: mi_option_t = 15;

/// What it is unless somebody has changed it, by `MIMALLOC_PURGE_DELAY` for example.
const USUAL_MS: c_long = 1_000;

/// Longer than a step takes.
const KEPT_MS: c_long = 60_000;

/// Keeps memory that was freed for a minute, so that each step finds that of the one before: pages that the system takes back
/// have to be cleared before they are used again. Of use where mimalloc is the allocator. To be called before there are threads.
pub fn keep_freed_memory() {
    // SAFETY: nobody else sets options, and this is called once, before anybody could.
    unsafe {
        if mi_option_get(PURGE_DELAY) == USUAL_MS {
            mi_option_set(PURGE_DELAY, KEPT_MS);
        }
    }
}

/// Lets this process have as many files open as the system allows, and says how many that is. Each connection is one, and
/// shells give few.
#[cfg(unix)]
pub fn open_files() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let before = limit.current;
    limit.current = limit.maximum;
    let allowed = match setrlimit(Resource::Nofile, limit) {
        Ok(()) => limit.current,
        Err(_) => before,
    };
    // None is no limit.
    allowed.map_or(usize::MAX, |files| files.try_into().unwrap_or(usize::MAX))
}

/// Where it is not known, few.
#[cfg(not(unix))]
pub fn open_files() -> usize {
    512
}

/// The second number of `/proc/PID/statm`.
#[cfg(target_os = "linux")]
fn resident_pages(statm: &str) -> Option<u64> {
    statm.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The 14th and 15th field of `/proc/PID/stat`: time in user mode and in the kernel. The second is the program's name in
/// brackets, which may contain anything.
#[cfg(target_os = "linux")]
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let kernel: u64 = fields.next()?.parse().ok()?;
    Some(user + kernel)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    /// The number of the option is that of the library that is linked: its usual value stands there.
    #[test]
    fn memory_that_was_freed_is_kept_for_a_minute() {
        // SAFETY: no other test asks for options.
        let kept = || unsafe { mi_option_get(PURGE_DELAY) };
        assert_eq!(kept(), USUAL_MS);
        keep_freed_memory();
        assert_eq!(kept(), KEPT_MS);
    }

    #[test]
    fn a_name_with_brackets_and_blanks_does_not_shift_the_fields() {
        let stat =
            "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 9 0 123 456 789 18446";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("7 (x"), None);
        assert_eq!(resident_pages("1000 250 30 1 0 99 0"), Some(250));
    }

    #[test]
    fn this_process_has_memory_and_its_time_grows() {
        let before = usage().expect("Linux tells");
        assert!(before.rss_bytes > 1 << 20, "{before:?}");
        // Until the kernel has counted a tick: at most some hundredths of a second.
        let mut sum = 0u64;
        while usage().expect("Linux tells").cpu_us == before.cpu_us {
            sum = (0..100_000).fold(sum, |a: u64, b| a.wrapping_mul(31).wrapping_add(b));
            std::hint::black_box(sum);
        }
    }
}
