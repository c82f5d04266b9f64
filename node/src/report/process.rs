//! What a process has used of memory and processor so far.

/// User and system time of this process over all its threads, in seconds.
pub fn cpu_seconds() -> f64 {
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 * 1e-6;
    usage().map_or(0.0, |usage| seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

/// User and system time of the running process `pid` over all its threads, in seconds; `None` where there is no such process
/// or the system does not tell.
pub fn cpu_seconds_of(pid: u32) -> Option<f64> {
    // SAFETY: the call only reads a figure of the system.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let spent = ticks_spent(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    (ticks > 0).then(|| spent as f64 / ticks as f64)
}

/// User and system time in a line of `/proc/PID/stat`: its fields 14 and 15. The second, the program's name in brackets, may
/// hold anything.
fn ticks_spent(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    ticks()?.checked_add(ticks()?)
}

/// Largest resident memory of this process so far, in bytes.
///
/// Where the kernel keeps the figure per address space (Linux), that is used: the one from `getrusage` survives `exec`,
/// so that a small worker that a large process has started would show its parent's peak.
pub fn peak_rss_bytes() -> u64 {
    peak_rss_bytes_of(std::process::id())
        .or_else(|| {
            let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
            usage().and_then(|usage| u64::try_from(usage.ru_maxrss).ok()).map(|peak| peak.saturating_mul(unit))
        })
        .unwrap_or(0)
}

/// Largest resident memory of the running process `pid` so far, in bytes; `None` where there is no such process or
/// the system does not tell.
pub fn peak_rss_bytes_of(pid: u32) -> Option<u64> {
    kilobytes(&std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM:")
}

/// Memory that programs can still get without swapping, in bytes; `None` where the system does not tell.
pub fn available_memory_bytes() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")
}

/// The line `NAME:  1234 kB` among others, in bytes.
fn kilobytes(lines: &str, name: &str) -> Option<u64> {
    let value = lines.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

fn usage() -> Option<libc::rusage> {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the pointer is valid for the write of one `rusage`, and `RUSAGE_SELF` names no other memory.
    let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    // SAFETY: `getrusage` fills the whole structure when it returns 0.
    (status == 0).then(|| unsafe { usage.assume_init() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_figure_is_read_from_its_line() {
        let status = "Name:\tnode\nVmPeak:\t  900000 kB\nVmHWM:\t  123456 kB\nVmRSS:\t 99 kB\n";
        assert_eq!(kilobytes(status, "VmHWM:"), Some(123_456 * 1024));
        assert_eq!(kilobytes("Name:\tnode\n", "VmHWM:"), None);
        assert_eq!(kilobytes("VmHWM:\t lots kB\n", "VmHWM:"), None);
        assert_eq!(kilobytes("VmHWM:\t 18446744073709551615 kB\n", "VmHWM:"), None);
    }

    #[test]
    fn peak_covers_memory_that_was_touched_and_given_back() {
        const BYTES: usize = 256 << 20;
        let before = peak_rss_bytes();
        assert!(before > 0 && before < 1 << 40, "{before}");
        let touched = std::hint::black_box(vec![1_u8; BYTES]);
        assert_eq!(touched[BYTES - 1], 1);
        drop(touched);
        assert!(peak_rss_bytes() >= BYTES as u64);
        assert!(peak_rss_bytes() >= before);
    }

    #[test]
    fn processor_time_grows_with_work() {
        let before = cpu_seconds();
        let mut state = 1_u64;
        while cpu_seconds() < before + 0.02 {
            for _ in 0..10_000 {
                state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
            }
        }
        assert!(cpu_seconds() >= before + 0.02);
    }

    #[test]
    fn the_ticks_of_a_process_are_read_from_its_line() {
        let stat = "77 (a) b (c) S 1 77 77 0 -1 4194560 900 0 0 0 123 45 6 7 20 0 1 0 99 1000 200";
        assert_eq!(ticks_spent(stat), Some(168));
        assert_eq!(ticks_spent("77 (node) S 1 77"), None);
        assert_eq!(ticks_spent(""), None);
        if cfg!(target_os = "linux") {
            let (own, read) = (cpu_seconds(), cpu_seconds_of(std::process::id()).unwrap());
            assert!((own - read).abs() < 5.0, "{own} and {read}");
        }
    }

    #[test]
    fn a_child_has_a_peak_of_its_own() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let peak = peak_rss_bytes_of(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        if cfg!(target_os = "linux") {
            assert!(peak.unwrap() > 0);
        }
    }
}
