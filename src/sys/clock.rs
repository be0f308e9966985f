//! Whether something keeps this host's clock right.
#![expect(unsafe_code, reason = "adjtimex has no safe wrapper")]

/// Whether the kernel's clock is disciplined by somebody (NTP, PTP); `None` where it cannot be asked.
pub fn is_synchronised() -> Option<bool> {
    // SAFETY: `struct timex` is numbers only, for which zero is a value; zero modes change nothing.
    let mut state: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live struct of the type that the call fills.
    let result = unsafe { libc::adjtimex(&raw mut state) };
    (result >= 0).then_some(state.status & libc::STA_UNSYNC == 0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_clock_can_be_asked() {
        assert!(super::is_synchronised().is_some());
    }
}
