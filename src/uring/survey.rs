//! What else this kernel's io_uring has, for people to read. The packet path asks [`super::probe`].

use io_uring::{Builder, IoUring, Probe, opcode};

use super::probe::RingError;

/// Entries of the rings that are made only to see whether the kernel takes a flag.
const ENTRIES: u32 = 4;
/// Completion entries of such a ring, to see whether their number may be chosen.
const COMPLETIONS: u32 = 16;

/// What was asked for by name, and whether the kernel has it.
pub type Answers = Vec<(&'static str, bool)>;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Survey {
    /// Operations.
    pub operations: Answers,
    /// Flags of io_uring_setup(2), the best combination that ringtun knows of among them.
    pub set_up_flags: Answers,
    /// What the kernel says of itself (IORING_FEAT_*).
    pub features: Answers,
}

type Prepare = fn(&mut Builder) -> &mut Builder;

/// Tries everything once. Nothing stays.
///
/// # Errors
/// [`RingError`], when there is no io_uring at all.
pub fn survey() -> Result<Survey, RingError> {
    let ring = IoUring::new(ENTRIES).map_err(RingError::SetUp)?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(RingError::Probe)?;
    let operations = [
        ("POLL_ADD", opcode::PollAdd::CODE),
        ("READ_FIXED", opcode::ReadFixed::CODE),
        ("WRITE_FIXED", opcode::WriteFixed::CODE),
        ("SENDMSG", opcode::SendMsg::CODE),
        ("TIMEOUT", opcode::Timeout::CODE),
        ("ACCEPT", opcode::Accept::CODE),
        ("ASYNC_CANCEL", opcode::AsyncCancel::CODE),
        ("CONNECT", opcode::Connect::CODE),
        ("READ", opcode::Read::CODE),
        ("WRITE", opcode::Write::CODE),
        ("SEND", opcode::Send::CODE),
        ("RECV", opcode::Recv::CODE),
        ("MSG_RING", opcode::MsgRingData::CODE),
        ("SEND_ZC", opcode::SendZc::CODE),
        ("READ_MULTISHOT", opcode::ReadMulti::CODE),
    ];
    let set_up_flags: [(&str, Prepare); 7] = [
        ("CQSIZE", |builder| builder.setup_cqsize(COMPLETIONS)),
        ("R_DISABLED", |builder| builder.setup_r_disabled()),
        ("SUBMIT_ALL", |builder| builder.setup_submit_all()),
        ("COOP_TASKRUN", |builder| builder.setup_coop_taskrun()),
        ("SINGLE_ISSUER", |builder| builder.setup_single_issuer()),
        ("DEFER_TASKRUN", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun()
        }),
        ("NO_SQARRAY", |builder| builder.setup_no_sqarray()),
    ];
    let parameters = ring.params();
    Ok(Survey {
        operations: operations
            .map(|(name, code)| (name, probe.is_supported(code)))
            .into(),
        set_up_flags: set_up_flags
            .map(|(name, prepare)| {
                let mut builder = IoUring::builder();
                (name, prepare(&mut builder).build(ENTRIES).is_ok())
            })
            .into(),
        features: vec![
            ("NODROP", parameters.is_feature_nodrop()),
            ("FAST_POLL", parameters.is_feature_fast_poll()),
            ("EXT_ARG", parameters.is_feature_ext_arg()),
            ("NATIVE_WORKERS", parameters.is_feature_native_workers()),
            ("RECVSEND_BUNDLE", parameters.is_feature_recvsend_bundle()),
            ("MIN_TIMEOUT", parameters.is_feature_min_timeout()),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_of_5_10_is_found() {
        let survey = survey().expect("io_uring");
        let old = [
            "POLL_ADD",
            "READ_FIXED",
            "ACCEPT",
            "SEND",
            "CQSIZE",
            "NODROP",
        ];
        for name in old {
            let all = [&survey.operations, &survey.set_up_flags, &survey.features];
            let found = all.into_iter().flatten().find(|(known, _)| *known == name);
            assert_eq!(found, Some(&(name, true)));
        }
    }
}
