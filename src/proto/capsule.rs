//! RFC 9297 capsules.
