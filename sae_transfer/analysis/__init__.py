"""What both sides together tell: metrics and the stages that write rows."""
