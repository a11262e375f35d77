// Condition maps, vertex stage: places a face's corner in the frame.
//
// In:  one vertex a corner, three corners a face, no indices (texture seams need no welding that way)
//        screen      x right, y down, [-1, 1] over the frame; z in (-10, 10), smaller is nearer
//        normal      world space, x right, y up, z to the viewer
//        uv          [0, 1], u right, v up
//        weight_sum  area / (area + 1e-8) of the face, area = twice its signed area in the frame; 1.0 will nearly do
// Out: normal; grid, the texture coordinates in [-1, 1], x right, y down
//
// The frame's y points down and so do rows in memory: what is read back has its first row on top, unflipped.

precision highp float;

in vec3 screen;
in vec3 normal;
in vec2 uv;
in float weight_sum;

out vec3 interpolated_normal;
out vec2 grid;

void main() {
    // The official barycentric weights fall short of 1 by the epsilon in their denominator. The hardware's do not,
    // so what they interpolate is scaled beforehand, the depth included.
    interpolated_normal = normal * weight_sum;
    grid = (uv * 2.0 - 1.0) * vec2(1.0, -1.0) * weight_sum;
    float depth = (screen.z + 10.0) * weight_sum;  // 0..20
    gl_Position = vec4(screen.xy, depth / 10.0 - 1.0, 1.0);  // w = 1: no perspective
}
