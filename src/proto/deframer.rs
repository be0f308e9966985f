//! Cuts capsules out of the decrypted byte stream.
