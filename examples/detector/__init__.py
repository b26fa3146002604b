"""Faster and Mask R-CNN with deformable convolution and RoI pooling, as in Deformable ConvNets v2."""
