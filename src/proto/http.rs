//! The HTTP/1.1 upgrade and the ordinary web answers.
