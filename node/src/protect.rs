//! Keeping an owner's memory to itself.
//!
//! A process of the same user may attach to another as a debugger does and read all of it, and a crash may leave all of it
//! in a file. An owner's memory holds the data, the adapters and the keys, so it asks the kernel for neither to happen
//! (`PR_SET_DUMPABLE`). What this costs: no core dump, and no gdb, strace or perf on a running owner, unless by root.
//! `VELUM_DUMPABLE=1` in the environment leaves the process as it is, for whoever looks for a fault in it.

/// The variable that switches this off.
const SWITCH: &str = "VELUM_DUMPABLE";

/// Shuts this process's memory to other processes of the user, where the system can.
pub(crate) fn shut_memory() {
    if std::env::var_os(SWITCH).is_some_and(|value| value == "1") {
        tracing::warn!("{SWITCH} is set: other processes of this user can read this one's memory");
        return;
    }
    #[cfg(target_os = "linux")]
    {
        // SAFETY: this operation takes one number and touches no memory of the process; the rest is ignored.
        let status = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
        if status != 0 {
            tracing::warn!("this process's memory cannot be shut: {}", std::io::Error::last_os_error());
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shut_unless_asked_otherwise() {
        shut_memory();
        // SAFETY: this operation takes nothing and touches no memory of the process.
        let dumpable = unsafe { libc::prctl(libc::PR_GET_DUMPABLE) };
        assert_eq!(dumpable == 0, std::env::var_os(SWITCH).is_none_or(|value| value != "1"));
    }
}
