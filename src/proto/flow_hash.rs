//! The symmetric flow hash.
