//! Sticky inner-address leases.
