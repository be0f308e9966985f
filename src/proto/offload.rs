//! virtio_net_hdr: validation and software segmentation.
